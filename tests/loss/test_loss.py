"""The loss: its mathematics as properties and against independent oracles, its errors, and where it must run."""

from types import SimpleNamespace

import mpmath
import pytest
import torch
from diffusion_orpo_loss import OrpoMetrics, beta_of_share, log_odds, odds_ratio_objective, orpo_loss, per_pair_error


BETAS = (0.1, 0.5, 2.0)


def predictions(*shape: int, seed: int = 0, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    """Predictions for winner and loser, and the target, with errors about 0.04 and 0.09."""
    generator = torch.Generator().manual_seed(seed)
    target, a, b = (torch.randn(shape, generator=generator) for _ in range(3))
    return tuple(x.to(dtype) for x in (target + 0.2 * a, target + 0.3 * b, target))


def exact_log_odds(m: float) -> mpmath.mpf:
    """log(p / (1 - p)) of p = exp(-m), from the definition of the odds, with 60 digits."""
    with mpmath.workdps(60):
        p = mpmath.exp(-mpmath.mpf(m))
        return mpmath.log(p / (1 - p))


def exact_loss(m_w: float, m_l: float, beta: float, temperature: float) -> float:
    with mpmath.workdps(60):
        root = mpmath.exp((exact_log_odds(m_w) - exact_log_odds(m_l)) / temperature)
        return float(m_w + beta * temperature * mpmath.log(1 + 1 / root))


@pytest.mark.parametrize("m", [1e-9, 1e-6, 1e-3, 0.01, 0.1, 0.5, 0.6931472, 1.0, 5.0, 16.0, 17.0, 40.0, 88.0, 100.0])
def test_log_odds_against_sixty_digits(m):
    m = torch.tensor(m)  # float32 rounds it: the oracle gets what the function gets
    assert log_odds(m).item() == pytest.approx(float(exact_log_odds(m.item())), rel=2e-6, abs=2e-7)


@pytest.mark.parametrize("temperature", [0.5, 1, 4])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "m_w, m_l", [(0.04, 0.09), (0.09, 0.04), (1e-6, 1e-3), (0.5, 0.5), (3.0, 20.0), (100.0, 1e-4)]
)
def test_loss_against_sixty_digits(m_w, m_l, beta, temperature):
    errors = torch.tensor([m_w]), torch.tensor([m_l])
    exact = exact_loss(errors[0].item(), errors[1].item(), beta, temperature)
    assert odds_ratio_objective(*errors, beta, temperature=temperature).item() == pytest.approx(exact, rel=2e-6)


def test_error_is_the_mean_over_everything_but_the_batch():
    prediction, _, target = predictions(3, 4, 5, 6)
    expected = [torch.nn.functional.mse_loss(prediction[i].double(), target[i].double()) for i in range(3)]
    torch.testing.assert_close(per_pair_error(prediction, target).double(), torch.stack(expected))


@pytest.mark.parametrize("shape", [(2,), (2, 7), (2, 4, 8, 8), (2, 77, 64), (2, 3, 5, 8, 8)])
def test_any_rank(shape):
    pred_w, pred_l, target = predictions(*shape)
    flat = (x.reshape(2, -1) for x in (pred_w, pred_l, target))
    torch.testing.assert_close(orpo_loss(pred_w, pred_l, target), orpo_loss(*flat))


@pytest.mark.parametrize("m", [1e-7, 1e-3, 0.05, 1.0, 10.0])  # beyond, exp(-z) underflows
@pytest.mark.parametrize("ratio", [0.1, 0.9, 1.1, 10.0])
@pytest.mark.parametrize("beta", BETAS)
def test_gradient_lowers_the_winners_error_and_raises_the_losers(m, ratio, beta):
    m_w = torch.tensor([m], dtype=torch.float64, requires_grad=True)
    m_l = torch.tensor([m * ratio], dtype=torch.float64, requires_grad=True)
    odds_ratio_objective(m_w, m_l, beta).backward()
    assert m_w.grad > 0
    assert m_l.grad < 0


def test_half_of_the_odds_gradient_at_equal_errors_goes_to_each_side():
    """At m_w = m_l the sigmoid is 1/2, and the derivative of the log odds is -1 / (1 - exp(-m))."""
    m = torch.full((1,), 0.3, dtype=torch.float64, requires_grad=True)
    other = m.detach().clone().requires_grad_()
    odds_ratio_objective(m, other, beta=0.1).backward()
    slope = 0.05 / (1 - torch.exp(torch.tensor(-0.3, dtype=torch.float64)))
    torch.testing.assert_close(other.grad, -slope.reshape(1))
    torch.testing.assert_close(m.grad, 1 + slope.reshape(1))


def loser_gradient(m_w: float, m_l: float, temperature: float) -> float:
    m_w, m_l = (torch.tensor([m], dtype=torch.float64, requires_grad=True) for m in (m_w, m_l))
    orpo = odds_ratio_objective(m_w, m_l, beta=1.0, temperature=temperature)
    return torch.autograd.grad(orpo.sum(), m_l)[0].item()


@pytest.mark.parametrize("temperature", [0.1, 4, 100])
def test_temperature_leaves_the_gradient_of_equal_errors_as_it_is(temperature):
    assert loser_gradient(0.05, 0.05, temperature) == pytest.approx(loser_gradient(0.05, 0.05, 1))


def test_the_higher_the_temperature_the_less_a_pair_counts_more_for_a_larger_error_of_its_winner():
    """Of two pairs with the same loser; at an infinite temperature, both count alike."""
    favours = [loser_gradient(0.1, 0.05, t) / loser_gradient(0.025, 0.05, t) for t in (0.5, 1, 4, 1e6)]
    assert favours == sorted(favours, reverse=True) and favours[1] > 1.9
    assert favours[-1] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), float("inf")])
def test_a_temperature_is_above_zero_and_finite(wrong):
    with pytest.raises(ValueError, match="temperature must be"):
        odds_ratio_objective(torch.tensor([0.1]), torch.tensor([0.1]), temperature=wrong)


def test_the_gradients_in_the_readme():
    """At errors of 0.05 and beta 0.1, where the earlier formula gives +0.95 and +0.05."""
    m_w, m_l = (torch.tensor([0.05], requires_grad=True) for _ in range(2))
    odds_ratio_objective(m_w, m_l, beta=0.1).backward()
    assert (round(m_w.grad.item(), 2), round(m_l.grad.item(), 2)) == (2.03, -1.03)


@pytest.mark.parametrize("scale", [1e-5, 1e-4, 1e-3])
def test_small_errors_compare_by_their_ratio(scale):
    """z tends to log(m_l / m_w), whatever the noise level's scale."""
    _, metrics = odds_ratio_objective(torch.tensor([2 * scale]), torch.tensor([6 * scale]), return_metrics=True)
    assert metrics["log_odds_chosen"].item() == pytest.approx(torch.tensor(3.0).log().item(), rel=3 * scale + 1e-6)


def error_gradients(m_w: torch.Tensor, m_l: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the summed objective on both errors (B,), in float64."""
    m_w, m_l = (m.double().clone().requires_grad_() for m in (m_w, m_l))
    return torch.autograd.grad(odds_ratio_objective(m_w, m_l, reduction="sum", **options), (m_w, m_l))


@pytest.mark.parametrize("temperature", [0.1, 1, 4])
@pytest.mark.parametrize("share", [1e-3, 0.25, 0.375, 0.4, 0.499])
def test_a_loser_share_is_the_share_of_each_pairs_gradient_at_every_error(share, temperature):
    m, weights = torch.logspace(-6, 1, 50, dtype=torch.float64), torch.rand(50, dtype=torch.float64) + 0.01
    on_w, on_l = error_gradients(m, m, loser_share=share, temperature=temperature, weights=weights)
    assert (on_w > 0).all() and (on_l < 0).all()
    torch.testing.assert_close(-on_l / (on_w - on_l), torch.full_like(m, share), rtol=1e-9, atol=0)


def test_with_beta_the_losers_share_vanishes_at_large_errors():
    """Why there is a loser share: the figures of the documentation, at beta 0.05."""
    m = torch.tensor([0.003, 0.02, 0.1, 0.3, 1.0])
    on_w, on_l = error_gradients(m, m, beta=0.05)
    torch.testing.assert_close(
        -on_l / (on_w - on_l), torch.tensor([0.47, 0.36, 0.17, 0.08, 0.04]).double(), atol=6e-3, rtol=0
    )


@pytest.mark.parametrize("scale", [1e-4, 0.3, 50])
def test_with_a_loser_share_scaling_all_errors_scales_all_gradients_alike(scale):
    """Predictions' distances from the target times sqrt(c), so errors times c: gradients are divided by sqrt(c)."""

    def gradients(distance: float) -> torch.Tensor:
        pred_w, pred_l, target = predictions(4, 4, 8, 8, dtype=torch.float64)
        inputs = [(target + distance * (pred - target)).requires_grad_() for pred in (pred_w, pred_l)]
        loss = orpo_loss(*inputs, target, loser_share=0.4, temperature=2)
        return torch.stack(torch.autograd.grad(loss, inputs))

    torch.testing.assert_close(gradients(scale**0.5) * scale**0.5, gradients(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("m_w, m_l", [(0.04, 0.09), (0.09, 0.04), (1e-6, 1e-3), (3.0, 20.0)])
def test_loss_with_a_loser_share_against_sixty_digits(m_w, m_l):
    errors = torch.tensor([m_w]), torch.tensor([m_l])
    with mpmath.workdps(60):  # a share of 3/8 is a weight of 3
        w, l = (mpmath.mpf(error.item()) for error in errors)
        exact = mpmath.log(w) + 3 * 2 * mpmath.log(1 + mpmath.sqrt(w / l))
    assert odds_ratio_objective(*errors, loser_share=0.375, temperature=2).item() == pytest.approx(
        float(exact), rel=2e-6, abs=2e-6
    )


def test_metrics_keep_their_meaning_with_a_loser_share():
    pred_w, pred_l, target = predictions(4, 4, 8, 8)
    losses, metrics = orpo_loss(pred_w, pred_l, target, loser_share=0.4, reduction="none", return_metrics=True)
    _, with_beta = orpo_loss(pred_w, pred_l, target, beta=beta_of_share(0.4), return_metrics=True)
    torch.testing.assert_close(losses, metrics["nll_loss"].log() - 4 * metrics["log_odds_ratio"])
    for name in set(metrics) - {"log_odds_ratio", "log_odds_chosen"}:
        assert torch.equal(metrics[name], with_beta[name])
    torch.testing.assert_close(metrics["log_odds_chosen"], with_beta["log_odds_chosen"], rtol=0.1, atol=0)


@pytest.mark.parametrize("wrong", [0, 0.5, -0.1, 1, float("nan"), float("inf")])
def test_a_loser_share_lies_between_0_and_a_half(wrong):
    with pytest.raises(ValueError, match="loser_share"):
        orpo_loss(*predictions(2, 4, 8, 8), loser_share=wrong)


def test_beta_and_a_loser_share_exclude_each_other():
    for beta in (0, 0.1):
        with pytest.raises(ValueError, match="give one of them"):
            orpo_loss(*predictions(2, 4, 8, 8), beta, loser_share=0.4)
    with pytest.raises(TypeError, match="loser_share"):
        orpo_loss(*predictions(2, 4, 8, 8), loser_share=torch.tensor(0.4))


@pytest.mark.parametrize("strength", [{}, {"loser_share": 0.4}])
def test_swapping_winner_and_loser_negates_z(strength):
    pred_w, pred_l, target = predictions(5, 4, 8, 8)
    _, metrics = orpo_loss(pred_w, pred_l, target, return_metrics=True, **strength)
    _, swapped = orpo_loss(pred_l, pred_w, target, return_metrics=True, **strength)
    assert torch.equal(metrics["log_odds_chosen"], -swapped["log_odds_chosen"])
    assert torch.equal(metrics["rewards/margins"], -swapped["rewards/margins"])
    assert torch.equal(metrics["rewards/accuracies"], 1 - swapped["rewards/accuracies"])


@pytest.mark.parametrize("beta", BETAS)
def test_loss_is_the_sum_of_the_logged_parts(beta):
    pred_w, pred_l, target = predictions(4, 4, 8, 8)
    loss, metrics = orpo_loss(pred_w, pred_l, target, beta, return_metrics=True, reduction="none")
    torch.testing.assert_close(loss, metrics["nll_loss"] - beta * metrics["log_odds_ratio"])
    assert set(metrics) == set(OrpoMetrics.__annotations__)
    assert all(value.shape == (4,) and not value.requires_grad for value in metrics.values())
    torch.testing.assert_close(metrics["rewards/margins"], metrics["rewards/chosen"] - metrics["rewards/rejected"])
    torch.testing.assert_close(metrics["rewards/chosen"], beta * metrics["logps/chosen"])


@pytest.mark.parametrize("beta", BETAS)
def test_agrees_with_trl_on_the_same_log_probabilities(beta, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    _, ours = orpo_loss(*predictions(16, 4, 8, 8), beta, return_metrics=True)
    trainer = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device="cpu"))
    theirs = ORPOTrainer.odds_ratio_loss(trainer, ours["logps/chosen"], ours["logps/rejected"])
    losses, chosen_rewards, rejected_rewards, mean_log_odds_ratio, mean_log_odds_chosen = theirs
    torch.testing.assert_close(beta * ours["log_odds_ratio"], losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours["rewards/chosen"], chosen_rewards)
    torch.testing.assert_close(ours["rewards/rejected"], rejected_rewards)
    assert ours["log_odds_ratio"].mean().item() == pytest.approx(float(mean_log_odds_ratio), rel=1e-4)
    assert ours["log_odds_chosen"].mean().item() == pytest.approx(float(mean_log_odds_chosen), rel=1e-4)


def test_beta_zero_is_supervised_fine_tuning():
    pred_w, pred_l, target = predictions(3, 4, 8, 8)
    pred_l.requires_grad_()
    loss = orpo_loss(pred_w, pred_l, target, beta=0)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(pred_w, target))
    loss.backward()
    assert not pred_l.grad.any()


@pytest.mark.parametrize("strength", [{"beta": 0.7}, {"loser_share": 0.4}])
def test_gradcheck(strength):
    pred_w, pred_l, target = predictions(2, 3, 4, dtype=torch.float64)
    inputs = pred_w.requires_grad_(), pred_l.requires_grad_()
    assert torch.autograd.gradcheck(lambda w, l: orpo_loss(w, l, target, reduction="none", **strength), inputs)


@pytest.mark.parametrize("m_w", [0.0, 1e-12, 1e-9, 1e-4, 1.0, 50.0, 100.0])
@pytest.mark.parametrize("m_l", [0.0, 1e-12, 1e-9, 1e-4, 1.0, 50.0, 100.0])
@pytest.mark.parametrize("strength", [{}, {"loser_share": 0.4}])
def test_finite_from_0_to_100(m_w, m_l, strength):
    target = torch.zeros(1, 4, 8, 8)
    pred_w = torch.full_like(target, m_w**0.5).requires_grad_()
    pred_l = torch.full_like(target, m_l**0.5).requires_grad_()
    loss = orpo_loss(pred_w, pred_l, target, **strength)
    loss.backward()
    assert loss.isfinite() and pred_w.grad.isfinite().all() and pred_l.grad.isfinite().all()


def test_a_pair_of_targets():
    pred_w, pred_l, target = predictions(3, 4, 8, 8)
    shift = torch.ones_like(target)
    shifted = orpo_loss(pred_w, pred_l + shift, (target, target + shift))
    torch.testing.assert_close(shifted, orpo_loss(pred_w, pred_l, target))
    assert not torch.isclose(shifted, orpo_loss(pred_w, pred_l + shift, target))


def test_weights_multiply_the_whole_loss_of_a_pair():
    pred_w, pred_l, target = predictions(3, 4, 8, 8)
    weights = torch.tensor([0.0, 1.0, 2.5])
    losses, metrics = orpo_loss(pred_w, pred_l, target, reduction="none", return_metrics=True)
    weighted, same_metrics = orpo_loss(pred_w, pred_l, target, weights=weights, reduction="none", return_metrics=True)
    torch.testing.assert_close(weighted, weights * losses)
    torch.testing.assert_close(metrics, same_metrics)
    mean = orpo_loss(pred_w, pred_l, target, weights=weights)
    torch.testing.assert_close(mean, (weights * losses).sum() / 3)  # by the number of pairs, not the weights


def test_reductions():
    pred_w, pred_l, target = predictions(3, 4, 8, 8)
    one_by_one = torch.stack([orpo_loss(pred_w[i : i + 1], pred_l[i : i + 1], target[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(orpo_loss(pred_w, pred_l, target, reduction="none"), one_by_one)
    torch.testing.assert_close(orpo_loss(pred_w, pred_l, target, reduction="sum"), one_by_one.sum())
    torch.testing.assert_close(orpo_loss(pred_w, pred_l, target), one_by_one.mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    """Squares of errors below 2e-4 vanish in float16; and a mean of 16,384 elements must not be summed in 8 bits."""
    target = torch.zeros(2, 4, 64, 64, dtype=dtype)
    pred_w, pred_l = torch.full_like(target, 1e-4), torch.full_like(target, 2e-4)
    loss, metrics = orpo_loss(pred_w, pred_l, target, return_metrics=True)
    assert loss.dtype == torch.float32
    expected = orpo_loss(pred_w.double(), pred_l.double(), target.double())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["rewards/accuracies"].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    pred_w, pred_l, target = predictions(2, 4, 8, 8)
    expected = orpo_loss(pred_w, pred_l, target)
    with torch.autocast("cpu", dtype=dtype):
        loss = orpo_loss(pred_w, pred_l, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


def test_compiles_to_one_graph():
    compiled = torch.compile(orpo_loss, fullgraph=True, backend="aot_eager")
    pred_w, pred_l, target = predictions(2, 4, 8, 8)
    strengths = [{"beta": beta} for beta in (0.1, 0.1, 0.7)]  # a number's second value makes it a symbol in the graph
    for strength in [*strengths, *({"loser_share": share} for share in (0.4, 0.4, 0.25))]:
        loss, metrics = compiled(pred_w, pred_l, target, **strength, weights=torch.ones(2), return_metrics=True)
        expected, expected_metrics = orpo_loss(pred_w, pred_l, target, **strength, return_metrics=True)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(metrics, expected_metrics)


@pytest.mark.parametrize("strength", [{}, {"loser_share": 0.4}])
def test_no_check_reads_from_the_device(strength):
    """Meta tensors hold no data: whatever asks for a value of theirs raises."""
    pred_w, pred_l, target = (torch.zeros(2, 4, 8, 8, device="meta", requires_grad=True) for _ in range(3))
    weights = torch.ones(2, device="meta")
    loss, _ = orpo_loss(pred_w, pred_l, (target, target), weights=weights, return_metrics=True, **strength)
    loss.backward()
    assert loss.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()


IMAGE, OTHER = torch.zeros(2, 4, 8, 8), torch.zeros(3, 4, 8, 8)


@pytest.mark.parametrize(
    "arguments, error, parts",
    [
        ((IMAGE, OTHER, IMAGE), ValueError, ["model_pred_w", "model_pred_l", "(2, 4, 8, 8)", "(3, 4, 8, 8)"]),
        ((IMAGE, IMAGE, OTHER), ValueError, ["model_pred_w", "target", "(2, 4, 8, 8)", "(3, 4, 8, 8)"]),
        ((IMAGE, IMAGE, (IMAGE, OTHER)), ValueError, ["model_pred_l", "target_l", "(3, 4, 8, 8)"]),
        ((IMAGE, IMAGE, IMAGE[:, :, :, :1]), ValueError, ["target", "(2, 4, 8, 1)"]),
        ((IMAGE[:0],) * 3, ValueError, ["model_pred_w", "at least one pair", "(0, 4, 8, 8)"]),
        ((IMAGE.sum(),) * 3, ValueError, ["model_pred_w", "(B, ...)"]),
        ((IMAGE.int(), IMAGE, IMAGE), TypeError, ["model_pred_w", "int32"]),
        ((IMAGE, IMAGE.long(), IMAGE), TypeError, ["model_pred_l", "int64"]),
        ((IMAGE, IMAGE, [IMAGE]), TypeError, ["target"]),
        ((IMAGE, IMAGE, None), TypeError, ["target"]),
        ((IMAGE, None, IMAGE), TypeError, ["model_pred_l", "NoneType"]),
        ((IMAGE, IMAGE, IMAGE, -0.1), ValueError, ["beta", "-0.1"]),
        ((IMAGE, IMAGE, IMAGE, float("nan")), ValueError, ["beta", "nan"]),
        ((IMAGE, IMAGE, IMAGE, float("inf")), ValueError, ["beta", "inf"]),
        ((IMAGE, IMAGE, IMAGE, torch.tensor(0.1)), TypeError, ["beta", "Tensor"]),
    ],
)
def test_errors_name_the_argument(arguments, error, parts):
    with pytest.raises(error) as raised:
        orpo_loss(*arguments)
    assert all(part in str(raised.value) for part in parts), raised.value


@pytest.mark.parametrize(
    "options, error, parts",
    [
        ({"weights": torch.ones(3)}, ValueError, ["weights", "(3,)", "(2,)"]),
        ({"weights": torch.ones(2, dtype=torch.int64)}, TypeError, ["weights", "int64"]),
        ({"reduction": "batchmean"}, ValueError, ["reduction", "batchmean"]),
    ],
)
def test_errors_name_the_option(options, error, parts):
    with pytest.raises(error) as raised:
        orpo_loss(IMAGE, IMAGE, IMAGE, **options)
    assert all(part in str(raised.value) for part in parts), raised.value


def test_errors_of_the_lower_layer_must_be_one_per_pair():
    with pytest.raises(ValueError, match=r"one error per pair.*\(2, 4, 8, 8\)"):
        odds_ratio_objective(IMAGE, IMAGE)


def test_package_is_typed_and_needs_only_torch():
    import importlib.metadata
    import importlib.resources

    assert importlib.resources.files("diffusion_orpo_loss").joinpath("py.typed").is_file()
    needed = [r for r in importlib.metadata.requires("diffusion_orpo_loss") if "extra ==" not in r]
    assert [r.split(">")[0] for r in needed] == ["torch"]
