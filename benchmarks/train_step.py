import sys, time, statistics as st, torch, torch.nn.functional as F
import time as _t
import os

CLK = _t.process_time if os.environ.get("CPUT") else _t.perf_counter
from timm.models.vision_transformer import VisionTransformer as T
from diffvit.config import ModelConfig, model_preset
from diffvit.models.vit import VisionTransformer as V

torch.set_num_threads(int(sys.argv[3]) if len(sys.argv) > 3 else 2)
which = sys.argv[1]
rounds = int(sys.argv[2])
if which == "vits":
    B = 8
    sh = dict(image_size=224, patch_size=16, embed_dim=384, depth=12, num_classes=1000)
    h = 6
    C = 3
else:
    B = 64
    sh = dict(image_size=28, patch_size=4, embed_dim=128, depth=6, num_classes=10, in_channels=1)
    h = 4
    C = 1
t = dict(
    img_size=sh["image_size"],
    patch_size=sh["patch_size"],
    in_chans=C,
    num_classes=sh["num_classes"],
    embed_dim=sh["embed_dim"],
    depth=sh["depth"],
)
M = {
    "plain": V(ModelConfig(variant="softmax", num_heads=h, **sh)),
    "v1": V(ModelConfig(variant="diff", num_heads=h // 2, **sh)),
    "v2": V(ModelConfig(variant="diff_v2", num_heads=h, **sh)),
    "timm": T(num_heads=h, **t),
    "timmdiff": T(num_heads=h // 2, attn_layer="diff", **t),
}
O = {k: torch.optim.AdamW(m.parameters(), lr=1e-4) for k, m in M.items()}
x = torch.randn(B, C, sh["image_size"], sh["image_size"])
y = torch.randint(0, sh["num_classes"], (B,))


def step(k):
    m, o = M[k], O[k]
    t0 = CLK()
    loss = F.cross_entropy(m(x), y)
    loss.backward()
    o.step()
    o.zero_grad()
    os.environ.get("NOFREE") or None
    return (CLK() - t0) * 1e3


for k in M:
    step(k)
R = {k: [] for k in M}
ks = list(M)
for r in range(rounds):
    for i in range(len(ks)):
        k = ks[(i + r) % len(ks)]
        R[k].append(step(k))
for k in ks:
    q = [a / b for a, b in zip(R[k], R["plain"])]
    print(
        f"{which} {k:9} {st.median(R[k]):8.1f} ms  min {min(R[k]):8.1f} ratio {st.median(q):.3f} [{min(q):.3f}-{max(q):.3f}]"
    )
