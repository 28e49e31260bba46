"""What could make a latent wrong without an error: other orders, writes in place, coincidences of sizes, interrupts."""

import pytest
import torch
from equations import Float64
from models import build
from relevances import state
from small import llama
from torch import nn
from torch._C import _len_torch_function_stack
from torch.nn import functional as F
from transformers import FalconConfig, FalconForCausalLM, FSMTConfig, FSMTForConditionalGeneration

from lxt.attributor import Attributor
from lxt.latents import Keep, Site, capture

KINDS = ("query", "key", "value", "pattern", "flow")
IDS = [1, 11, 12, 13, 14, 15, 16]


def random(*size: int) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def linear(columns: int, rows: int) -> nn.Linear:
    module = nn.Linear(columns, rows, bias=False).double()
    nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(columns + rows)).requires_grad_(False)
    return module


def read(layer: nn.Module, x: torch.Tensor, kinds=KINDS, model: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Of a layer that is all there is, or that lies in `model`."""
    batch, length = x.shape[:2]
    with capture([Site(kind, 0, layer, "attention") for kind in kinds], batch, length) as sink:
        (model or layer)(x.clone().requires_grad_()).pow(3).sum().backward()
        return {kind: sink.stacked(kind, torch.ones(batch, length, dtype=torch.bool)).tensor for kind in kinds}


@pytest.mark.parametrize("latent", ["flow", "head", "residual_mid", Keep("neuron", top=3)])
def test_an_interrupt_leaves_nothing_in_force(latent):
    model = llama()
    before = state(model)

    def interrupted(module, args):
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        Attributor(model).attribute(IDS, latents=latent)
    handle.remove()
    assert _len_torch_function_stack() == 0
    assert state(model) == before


def test_an_interrupt_leaves_no_watch_on_a_bare_model():
    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    layer = Interrupted()
    with pytest.raises(KeyboardInterrupt), capture([Site("flow", 0, layer, "attention")], 1, 3):
        layer(random(1, 3, 4).requires_grad_())
    assert _len_torch_function_stack() == 0


def falcon() -> FalconForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return FalconForCausalLM(FalconConfig(**sizes, initializer_range=0.2)).eval().double()


def test_a_module_whose_output_is_written_into():
    """Falcon adds attention's output to the MLP's in place."""
    model = falcon()
    with Float64():
        out = Attributor(model, rules="cp").attribute(IDS, 42, latents=("transformer.h.0.mlp", "mlp_out"))
    torch.testing.assert_close(out.latents["transformer.h.0.mlp"].tensor[0], out.latents["mlp_out"].tensor[0])


class Layer(nn.Module):
    """Attention, and a norm and an MLP behind it, with the stream added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.input_norm, self.mlp_norm = nn.RMSNorm(8).double(), nn.RMSNorm(8).double()
        self.mlp = MLP()

    def forward(self, x):
        added = self.self_attn(self.input_norm(x))
        added += x
        return added + self.mlp(self.mlp_norm(added))


class Attention(nn.Module):
    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.v_proj, self.o_proj = linear(8, 8), linear(8, 8)

    def forward(self, x):
        return self.o_proj(self.v_proj(x).cumsum(1))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = linear(8, 12), linear(12, 8)

    def forward(self, x):
        return self.down_proj(F.relu(self.up_proj(x)))


def test_the_stream_added_in_place_is_no_norm_behind_attention():
    layer, x = Layer(), random(1, 3, 8)
    for part in layer.parameters():
        part.requires_grad_(False)
    added, mlp = layer.self_attn.o_proj, layer.mlp
    whole = Site("residual", 0, layer)
    places = [
        Site("attn_out", 0, added, "branch", of=(whole,)),
        Site("residual_mid", 0, layer, "branch", of=(whole, Site("", 0, added), Site("", 0, mlp))),
    ]
    with capture(places, 1, 3) as sink:
        layer(x.clone().requires_grad_()).pow(3).sum().backward()
    mask = torch.ones(1, 3, dtype=torch.bool)
    found = {kind: sink.stacked(kind, mask).tensor[0] for kind in ("attn_out", "residual_mid")}

    branch = layer.self_attn(layer.input_norm(x)).detach()
    middle = (branch + x).requires_grad_()
    (middle + mlp(layer.mlp_norm(middle))).pow(3).sum().backward()
    torch.testing.assert_close(found["residual_mid"], (middle * middle.grad).sum(-1).detach())
    torch.testing.assert_close(found["attn_out"], (branch * middle.grad).sum(-1))


def test_as_many_heads_as_tokens_could_be_either():
    class HeadsFirst(nn.Module):
        def forward(self, x):  # [batch, head, token, d_head]
            return x * 2

    layer = HeadsFirst()
    for heads, length in ((4, 4), (4, 3)):
        with (
            capture([Site("a.norm", 0, layer)], 1, length),
            pytest.raises(ValueError, match=r"'a\.norm' in layer 0 \(HeadsFirst\) has the shape"),
        ):
            layer(random(1, heads, length, 5).requires_grad_())


@pytest.mark.parametrize("checkpoint", ["off", "layer"])
def test_tokens_before_rows_are_never_mixed_up(checkpoint):
    """FSMT's layers hand on [token, batch, hidden]; four prompts of four tokens would fit either way."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "src_vocab_size": 61, "tgt_vocab_size": 61, "langs": ["en", "de"]}
    counts = {
        f"{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 40))
    }
    model = FSMTForConditionalGeneration(FSMTConfig(**sizes, **counts, decoder_start_token_id=2)).eval()
    explainer = Attributor(model, checkpoint=checkpoint)
    rows = [[5, 9, 7, 3], [4, 11, 6, 12], [10, 2, 8, 13], [7, 7, 9, 14]]
    with pytest.raises(ValueError, match="other tokens, or in another order"):
        explainer.attribute(rows, latents="residual")
    found = explainer.attribute(rows, latents="residual", batch_size=1).latents["residual"].tensor
    for place, row in enumerate(rows):
        alone = explainer.attribute([row], latents="residual").latents["residual"].tensor
        torch.testing.assert_close(found[:, place], alone[:, 0])


def test_as_many_prompts_as_tokens_are_right():
    explainer = Attributor(llama())
    rows = [[5, 9, 7, 3], [4, 11, 6, 12], [10, 2, 8, 13], [7, 7, 9]]
    latents = ("residual", "head", *KINDS)
    found = explainer.attribute(rows, 42, latents=latents).latents
    for place, row in enumerate(rows):
        alone = explainer.attribute([row], 42, latents=latents).latents
        for name in latents:
            got = found[name].tensor[:, place]
            got = got[..., 4 - len(row) :, 4 - len(row) :] if name in ("pattern", "flow") else got[:, 4 - len(row) :]
            torch.testing.assert_close(got, alone[name].tensor[:, 0], rtol=1e-4, atol=1e-5)


class Written(nn.Module):
    """Attention of three heads, in ways that are easy to misread."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.project, self.inner = how, linear(12, 36), nn.Sequential(linear(12, 12))

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 3, 4)).unbind(2)  # [batch, token, head, d_head]
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if self.how == "heads first":
            weights = torch.einsum("bhqd,bhkd->hbqk", q / 2, k).softmax(-1)
            mixed = torch.einsum("hbqk,bhkd->bhqd", weights, v)
        elif self.how == "added by baddbmm":
            q, k = (part.flatten(0, 1) for part in (q, k))
            first = torch.bmm(q[..., :2] / 2, k[..., :2].transpose(1, 2))
            weights = torch.baddbmm(first, q[..., 2:] / 2, k[..., 2:].transpose(1, 2)).softmax(-1)
            mixed = torch.bmm(weights, v.flatten(0, 1)).unflatten(0, (-1, 3))
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("how", ["heads first", "added by baddbmm"])
@pytest.mark.parametrize("batch", [1, 2])
def test_however_attention_is_written_it_is_right_or_refused(how, batch):
    x = random(batch, 5, 12)
    expected = read(Written("fused"), x)
    try:
        found = read(Written(how), x)
    except ValueError as error:
        refused = (how, batch) == ("heads first", 2) and "leave that latent out" in str(error)
        assert refused
        return
    for kind in KINDS:
        torch.testing.assert_close(found[kind], expected[kind])


def test_repeated_heads_are_summed_only_where_they_lie_side_by_side():
    class Repeats(nn.Module):
        def __init__(self, tiled: bool) -> None:
            super().__init__()
            self.tiled, self.project, self.inner = tiled, linear(8, 32), nn.Sequential(linear(8, 8))

        def forward(self, x):
            batch, length, _ = x.shape
            q, k, v = self.project(x).split([16, 8, 8], -1)
            q, k, v = q.unflatten(-1, (4, 4)), k.unflatten(-1, (2, 4)), v.unflatten(-1, (2, 4))
            if self.tiled:  # heads 0, 1, 0, 1
                k, v = (part[:, :, None].expand(-1, -1, 2, -1, -1).reshape(batch, length, 4, 4) for part in (k, v))
            else:
                q = q[:, :, [0, 2, 1, 3]]
                k, v = (part[:, :, :, None].expand(-1, -1, -1, 2, -1).reshape(batch, length, 4, 4) for part in (k, v))
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    x = random(1, 5, 8)
    tiled, beside = (read(Repeats(how), x, ("key", "value", "flow")) for how in (True, False))
    del beside
    for kind in ("key", "value"):
        heads = tiled[kind].shape[-1]
        assert heads == 4  # one for each that attends, since how they were repeated is not known
    torch.testing.assert_close(tiled["flow"].sum(-2).transpose(2, 3), tiled["value"])


@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_what_else_is_read_changes_nothing(name):
    """Gemma 2 has a norm behind attention: it is found though a reading of the module before it lies in between."""
    model, latents = build(name, "eager"), ("attn_out", "residual_mid", "mlp_out", "residual_pre")
    paths = ("model.layers.0.self_attn", "model.layers.0.self_attn.o_proj", "model.layers.0.mlp", "model.layers.0")
    with Float64():
        explainer = Attributor(model)
        together = explainer.attribute(IDS, 42, latents=(*latents, *paths)).latents
        for latent in (*latents, *paths):
            alone = explainer.attribute(IDS, 42, latents=latent).latents[latent].tensor
            torch.testing.assert_close(together[latent].tensor, alone)
