"""Recurrent models as a whole: MambaLRP's equations, the auditor, the size of chunks, cycles without gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lxt
from lxt.audit import audit
from lxt.composites import Composite
from lxt.coverage.precision import Float64

modeling_mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
if not hasattr(modeling_mamba, "mamba_selective_scan"):
    pytest.skip("this transformers writes recurrences in an older form, which is refused", allow_module_level=True)

from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM  # noqa: E402

CLOSE = 1e-10  # float64, relative to the largest number
UNIFORM = lxt.ATTN_LRP.but(recurrence="uniform")
STEPS = {"time_step_min": 0.3, "time_step_max": 1.0, "initializer_range": 0.3}  # large, so that the states matter


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def by_patching(model: nn.Module, x: Tensor, rules: str | Composite, target: Callable[..., Tensor]) -> Tensor:
    leaf = x.clone().requires_grad_()
    with Float64(), lxt.monkey_patch(model, rules):
        value = target(model(inputs_embeds=leaf))
    return x * torch.autograd.grad(value, leaf)[0]


def last_logit(output: object) -> Tensor:
    return output.logits[0, -1, 5]  # type: ignore[attr-defined]


def mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 3}
    return MambaForCausalLM(MambaConfig(**sizes, **STEPS)).double().eval()


def mamba2(chunk_size: int) -> Mamba2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "head_dim": 8}
    config = Mamba2Config(**sizes, num_heads=4, n_groups=2, expand=2, chunk_size=chunk_size, **STEPS)
    return Mamba2ForCausalLM(config).double().eval()


def silu(x: Tensor) -> Tensor:
    """SiLU under MambaLRP's rule (arXiv 2406.07592, section 4.1): x [sigma(x)]."""
    return x * x.sigmoid().detach()


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    return norm.weight * x * (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt().detach()


def mixer_of_the_paper(mixer: nn.Module, x: Tensor) -> Tensor:
    """One token after the other, with what the paper detaches detached: step sizes, B, C, and half of the gate."""
    hidden, gate = mixer.in_proj(x).chunk(2, -1)
    tokens = hidden.shape[1]
    kernel = mixer.conv1d.weight
    padded = F.pad(hidden.transpose(1, 2), (kernel.shape[-1] - 1, 0))
    hidden = silu(F.conv1d(padded, kernel, mixer.conv1d.bias, groups=kernel.shape[0]).transpose(1, 2))
    rank, size = mixer.time_step_rank, mixer.ssm_state_size
    step, write, read = (part.detach() for part in mixer.x_proj(hidden).split([rank, size, size], -1))
    step = F.softplus(mixer.dt_proj(step)).detach()
    state, outputs = torch.zeros(1, hidden.shape[-1], size, dtype=x.dtype), []
    for t in range(tokens):
        decay = (step[:, t, :, None] * -mixer.A_log.exp()).exp()
        state = decay * state + step[:, t, :, None] * write[:, t, None] * hidden[:, t, :, None]
        outputs.append((state * read[:, t, None]).sum(-1) + mixer.D * hidden[:, t])
    product = torch.stack(outputs, 1) * silu(gate)
    return mixer.out_proj(0.5 * product + 0.5 * product.detach())


def test_mamba_gets_the_relevance_of_mambalrp() -> None:
    model, x = mamba(), normal(1, 9, 16)
    model.requires_grad_(False)
    found = by_patching(model, x, "attnlrp", last_logit)

    leaf = x.clone().requires_grad_()
    stream = leaf
    for block in model.backbone.layers:
        stream = stream + mixer_of_the_paper(block.mixer, rms_norm(stream, block.norm))
    logit = model.lm_head(rms_norm(stream, model.backbone.norm_f))[0, -1, 5]
    expected = x * torch.autograd.grad(logit, leaf)[0]
    assert distance(found, expected) < CLOSE
    with Float64():
        assert float(logit.detach()) == pytest.approx(float(last_logit(model(inputs_embeds=x))), rel=1e-12)


@pytest.mark.parametrize("rules", [lxt.ATTN_LRP, lxt.CP_LRP, UNIFORM], ids=["attnlrp", "cp", "uniform"])
def test_the_size_of_chunks_does_not_matter(rules: Composite) -> None:
    x = normal(1, 9, 16)
    small, large = (by_patching(mamba2(size), x, rules, last_logit) for size in (4, 16))
    assert distance(small, large) < CLOSE


RULES = (lxt.ATTN_LRP, lxt.CP_LRP, UNIFORM, lxt.GRADIENT)


@pytest.mark.parametrize("rules", RULES, ids=["attnlrp", "cp", "uniform", "gradient"])
@pytest.mark.parametrize("make", [mamba, lambda: mamba2(4)], ids=["mamba", "mamba 2"])
def test_the_auditor_finds_the_same(make: Callable[[], nn.Module], rules: Composite) -> None:
    model, x = make(), normal(1, 9, 16)
    found = by_patching(model, x, rules, last_logit)
    with Float64():
        audited = audit(model, {"inputs_embeds": x}, last_logit, rules)
    assert not audited.unknown
    assert distance(found, audited.relevance["inputs_embeds"]) < CLOSE


def test_the_choice_changes_the_relevance() -> None:
    model, x = mamba(), normal(1, 9, 16)
    value_only, uniform, gradient = (
        by_patching(model, x, lxt.ATTN_LRP.but(recurrence=choice), last_logit)
        for choice in ("value_only", "uniform", "gradient")
    )
    assert distance(uniform, value_only) > 0.01
    assert distance(gradient, value_only) > 0.01


def test_cycles_that_run_without_gradients_are_explained_too() -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "HrmTextConfig"):
        pytest.skip("this transformers has no HRM-Text")

    def relevance(cycles: list[int], bare: bool = False) -> tuple[Tensor, float]:
        torch.manual_seed(0)
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
        config = transformers.HrmTextConfig(
            **sizes, num_layers_per_stack=1, head_dim=8, L_bp_cycles=cycles, initializer_range=0.3
        )
        model = transformers.HrmTextForCausalLM(config).double().eval()
        model.requires_grad_(False)
        x = normal(1, 5, 16)
        with Float64():
            logit = float(last_logit(model(inputs_embeds=x, use_cache=False)))
        return by_patching(model, x, "cp", last_logit), logit

    found, logit = relevance([1])  # transformers: one inner cycle of three has gradients
    everything, _ = relevance([3, 3])
    assert torch.equal(found, everything)
    # the state starts at zero, so that nothing but the embeddings is explained
    assert float(found.sum()) == pytest.approx(logit, rel=1e-9)


# what the scans and gates of such models are made of, in the rules and in the auditor


class Formula(nn.Module):
    def __init__(self, formula: Callable[..., Tensor]) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.formula(a, b)


LOWER = torch.eye(3, dtype=torch.float64) + 0.3 * normal(3, 3, seed=7).tril(-1)


def largest_of_groups(a: Tensor, b: Tensor) -> Tensor:
    index = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    return torch.zeros(3, 2, dtype=a.dtype).scatter_reduce(1, index, a, "amax", include_self=False).sum(1) + b.sum(1)


def softcapped(gate: Tensor, up: Tensor) -> Tensor:
    return torch.tanh(gate) * torch.sigmoid(gate) * torch.tanh(up)


# formula, composite, and the coefficients of a and b by hand
MADE_OF: dict[str, tuple[Callable[..., Tensor], Composite, Callable[[Tensor, Tensor], Tensor]]] = {
    # the inverse is a denominator, a constant; the right-hand side is linear
    "solve_triangular": (
        lambda a, b: torch.linalg.solve_triangular(LOWER + a.tril(-1), b, upper=False),
        lxt.ATTN_LRP,
        lambda a, b: torch.linalg.solve_triangular((LOWER + a.tril(-1)).detach(), b, upper=False),
    ),
    "solve": (
        lambda a, b: torch.linalg.solve(LOWER + a, b),
        lxt.ATTN_LRP,
        lambda a, b: torch.linalg.inv(LOWER + a).detach() @ b,
    ),
    "inverse": (
        lambda a, b: torch.linalg.inv(LOWER + a) @ b,
        lxt.ATTN_LRP,
        lambda a, b: torch.linalg.inv(LOWER + a).detach() @ b,
    ),
    "scatter_reduce": (largest_of_groups, lxt.ATTN_LRP, largest_of_groups),
    "sign": (lambda a, b: a.sign() * b, lxt.ATTN_LRP, lambda a, b: a.sign().detach() * b),
    # a square of an activation is one activation: bitnet's relu^2 gate
    "squared gate": (
        lambda a, b: a.relu().square() * b,
        lxt.CP_LRP,
        lambda a, b: a.relu().square().detach() * b,
    ),
    # gates gate element by element; a linear attention's products with an activation of the keys share equally
    "no gate in a matrix product": (
        lambda a, b: F.silu(a) @ b,
        lxt.CP_LRP,
        lambda a, b: 0.5 * ((a * a.sigmoid().detach()) @ b.detach() + (a * a.sigmoid()).detach() @ b),
    ),
    # both factors come from a tanh, one of them behind a constant: neither is the gate
    "gates behind constants": (
        softcapped,
        lxt.CP_LRP,
        lambda a, b: (
            0.5
            * a.sigmoid().detach()
            * (a * (a.tanh() / a * b.tanh()).detach() + b * (b.tanh() / b * a.tanh()).detach())
        ),
    ),
}


@pytest.mark.parametrize("name", MADE_OF)
def test_parts_have_their_rule_in_both_mechanisms(name: str) -> None:
    formula, rules, by_hand = MADE_OF[name]
    a, b = normal(3, 3, seed=1), normal(3, 3, seed=2)
    model = Formula(formula)

    def coefficients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (a, b)]
        return torch.autograd.grad(function(*leaves).sum(), leaves, materialize_grads=True, allow_unused=True)

    with lxt.monkey_patch(model, rules):
        found = coefficients(model)
    audited = audit(model, {"a": a, "b": b}, torch.sum, rules, wrt=("a", "b"))
    assert not audited.unknown
    for x, coefficient, expected, key in zip((a, b), found, coefficients(by_hand), "ab", strict=True):
        torch.testing.assert_close(coefficient, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(audited.relevance[key], x * expected, rtol=1e-12, atol=1e-12)
