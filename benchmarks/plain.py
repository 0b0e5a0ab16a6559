"""The pretraining step as a straightforward author writes it: MONAI's `SwinTransformer` and textbook attention.

Views go through one by one, softmaxes are written out, every cell goes through every head, AdamW and the teacher's
average are plain loops. It computes what `dagman-swin` does, so that the two can be timed side by side.
"""

import copy
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dagman.nets.swin import SwinConfig
from dagman.nets.transformer import sine_cosine_position
from dagman.pretext import hiding
from dagman.pretext.method import MethodConfig
from dagman.types import Views


class Attention(nn.Module):
    """A transformer block over all tokens, its matrix written out and returned."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, and the attention of all heads."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attention = (query @ key.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(dim=-1)
        x = x + self.proj((attention @ value).transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm2(x)), attention


class Encoder(nn.Module):
    """MONAI's Swin with semantic attention in series."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        from monai.networks.nets.swin_unetr import SwinTransformer

        self.swin = SwinTransformer(
            in_chans=1,
            embed_dim=config.embed_dim,
            window_size=(config.window,) * 3,
            patch_size=(2, 2, 2),
            depths=config.depths,
            num_heads=config.num_heads,
            drop_path_rate=config.drop_path,
            downsample="merging",
        )
        self.hidden_token = nn.Parameter(0.02 * torch.randn(config.embed_dim))
        self.cls_token = nn.Parameter(0.02 * torch.randn(config.cell_width))
        self.blocks = nn.ModuleList(Attention(config.cell_width, 8) for _ in range(2))
        self.norm = nn.LayerNorm(config.cell_width)

    def forward(self, images: Tensor, unseen: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cell tokens, [CLS], its attention and the final map; `value` stands for the patches of unseen cells."""
        x = self.swin.patch_embed(images)
        x = torch.where(unseen, value.to(x.dtype)[None, :, None, None, None], x)
        levels = [self.swin.proj_out(self.swin.pos_drop(x), True)]
        for stage in (self.swin.layers1, self.swin.layers2, self.swin.layers3):
            x = stage[0](x.contiguous())
            levels.append(self.swin.proj_out(x, True))
        batch, width, *grid = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + sine_cosine_position((grid[0], grid[1], grid[2]), width, x.device)
        tokens = torch.cat([self.cls_token.expand(batch, 1, width), tokens], dim=1)
        for block in self.blocks:
            tokens, attention = block(tokens)
        row = attention.mean(dim=1)[:, 0, 1:]
        x = tokens[:, 1:].transpose(1, 2).reshape(x.shape)
        tokens = self.norm(tokens)
        final = self.swin.proj_out(self.swin.layers4[0](x.contiguous()), True)
        return tokens[:, 1:], tokens[:, 0], row / row.sum(dim=-1, keepdim=True), final


class Head(nn.Module):
    """iBOT's head: three layers, a unit vector, a weight-normalised layer to K."""

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 256)
        )
        self.last = nn.Parameter(0.02 * torch.randn(prototypes, 256))

    def forward(self, x: Tensor) -> Tensor:
        """Features to logits."""
        return functional.normalize(self.mlp(x).float(), dim=-1) @ functional.normalize(self.last, dim=-1).T


class Network(nn.Module):
    """Student or teacher."""

    def __init__(self, config: SwinConfig, prototypes: int) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        widths = {"aitd": config.cell_width, "ampd": config.cell_width, "gitd": config.final_width}
        self.heads = nn.ModuleDict({name: Head(width, prototypes) for name, width in widths.items()})
        self.voxels = nn.Linear(config.final_width, 32**3)

    def forward(self, images: Tensor, unseen: Tensor, value: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Logits of all heads, attention, final map."""
        tokens, cls, attention, final = self.encoder(images, unseen, value)
        features = {"aitd": cls, "ampd": tokens, "gitd": final.mean(dim=(2, 3, 4))}
        return {name: self.heads[name](x) for name, x in features.items()}, attention, final

    def predict(self, final: Tensor) -> Tensor:
        """A crop from the final map."""
        batch, _, *grid = final.shape
        voxels = self.voxels(final.movedim(1, -1)).reshape(batch, *grid, 32, 32, 32)
        return voxels.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, 1, *(32 * side for side in grid))


class PlainStep:
    """A whole pretraining step."""

    def __init__(self, encoder: SwinConfig, method: MethodConfig, crop: int) -> None:
        self.method, self.cells = method, crop // 16
        self.student = Network(encoder, method.heads.num_prototypes)
        self.teacher = copy.deepcopy(self.student).requires_grad_(requires_grad=False).eval()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5, foreach=False)
        self.centers = {name: torch.zeros(method.heads.num_prototypes) for name in self.student.heads}

    def step(self, views: Views, number: int, *, bf16: bool) -> float:
        """Forward, backward, optimizer, teacher, centers; the loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, said = self._loss(views, torch.Generator().manual_seed(number))
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 3.0, foreach=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.mul_(0.99).add_(0.01 * theirs)
            for name, center in self.centers.items():
                mean = torch.stack([logits[name].flatten(0, -2).mean(dim=0) for logits in said]).mean(dim=0)
                self.centers[name] = 0.9 * center + 0.1 * mean
        return loss.item()

    def _loss(self, views: Views, draws: torch.Generator) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The four losses, view by view."""
        images, batch, cells = [views.u, views.v], len(views.u), self.cells**3
        dropped = hiding.random(2 * batch, cells, count=math.floor(0.7 * cells), generator=draws).chunk(2)
        zero, token = torch.zeros(len(self.student.encoder.hidden_token)), self.student.encoder.hidden_token
        with torch.no_grad():
            told = [self._see(self.teacher, *given, zero) for given in zip(images, dropped, strict=True)]
        hidden = [hiding.attended(attention, ratio=0.7, hint_ratio=0.1) for _, attention, _ in told]
        mine = [self._see(self.student, *given, token) for given in zip(images, hidden, strict=True)]
        total = torch.zeros(())
        for view, other in itertools.permutations(range(2), 2):
            for name in ("aitd", "gitd"):
                total = total + 0.05 * self._cross_entropy(name, mine[view][0], told[other][0]).mean()
            rows = self._cross_entropy("ampd", mine[view][0], told[view][0])
            total = total + 0.05 * ((rows * hidden[view]).sum(dim=1) / hidden[view].sum(dim=1)).mean()
            voxels = hiding.repeat(hidden[view], (self.cells,) * 3, 16)[:, None]
            error = (self.student.predict(mine[view][2]).float() - images[view]).abs() * voxels
            total = total + 0.5 * error.sum() / (voxels.sum() + 1e-5)
        return total, [logits for logits, _, _ in told]

    def _see(self, network: Network, images: Tensor, unseen: Tensor, value: Tensor) -> tuple[Any, Tensor, Tensor]:
        seen: tuple[Any, Tensor, Tensor] = network(images, hiding.repeat(unseen, (self.cells,) * 3, 8)[:, None], value)
        return seen

    def _cross_entropy(self, name: str, mine: dict[str, Tensor], told: dict[str, Tensor]) -> Tensor:
        targets = ((told[name] - self.centers[name]) / 0.04).softmax(dim=-1)
        return -(targets * (mine[name] / 0.1).log_softmax(dim=-1)).sum(dim=-1)
