"""A kernel that does all that sanitizers look for: what does not find it looks at nothing.

It has the name of one of the library's, by which they are told which kernels to look at.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

RACE = """{
.reg .u32 place;
mov.u32 place, global_smem;
st.shared.u32 [place], $1;
ld.shared.u32 $0, [place];
}"""


@triton.jit
def forward_kernel(numbers, out, COUNT: tl.constexpr, RACE: tl.constexpr):
    lane = tl.arange(0, COUNT)
    # Numbers that nobody wrote, and half of them beyond the tensor. Their sum takes shared memory.
    total = tl.sum(tl.load(numbers + lane), 0)
    raced = tl.inline_asm_elementwise(RACE, "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(out + lane, total + raced)


def arguments(device: str) -> tuple[Any, ...]:
    count = 256
    out = torch.empty(count, dtype=torch.int32, device=device)
    # The last one that is allocated: beyond another, memcheck might find the next.
    unwritten = torch.empty(count // 2, dtype=torch.int32, device=device)
    return unwritten, out, count, RACE


if __name__ == "__main__":
    forward_kernel[(1,)](*arguments("cuda"))
    torch.cuda.synchronize()
