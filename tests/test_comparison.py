"""Statistics by hand, corruptions, regrouped batches, and a whole comparison of tiny models with its report."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from diffvit.analysis import measure, speed
from diffvit.analysis.arms import FinishedRun, check_arms, differences
from diffvit.analysis.attention_noise import _inside
from diffvit.analysis.comparison import CompareOptions, compare
from diffvit.analysis.confusion import confusion_figure
from diffvit.analysis.curves import read_curves
from diffvit.analysis.figures import draw
from diffvit.analysis.findings import findings
from diffvit.analysis.finished_runs import load_run
from diffvit.analysis.regroup import regroup
from diffvit.analysis.report import _worsened, render, spread, write_report, write_result
from diffvit.analysis.robustness import CORRUPTIONS, corrupt
from diffvit.analysis.similarity import Similarity
from diffvit.analysis.statistics import calibration_error, mean_and_std
from diffvit.compare import _name
from diffvit.config import DataConfig, ModelConfig, OptimConfig, RunConfig, to_json
from diffvit.data.batches import SKIPPED_LABEL, Batch
from diffvit.data.fingerprint import Fingerprint, SplitFingerprint
from diffvit.manifest import WEIGHTS_NAME, write_manifest
from diffvit.models.vit import VisionTransformer

SIDE = 12


def make_run(variant: Any, seed: int, *, lr: float = 1e-3, depth: int = 2, **curves: Any) -> FinishedRun:
    heads = {"softmax": 2, "diff": 1, "diff_v2": 2}[variant]
    model = ModelConfig(variant=variant, image_size=SIDE, patch_size=3, in_channels=1, num_classes=3, embed_dim=16,
                        depth=depth, num_heads=heads)  # fmt: skip
    config = RunConfig(name=f"{variant}-{seed}", seed=seed, model=model, data=DataConfig(mean=(0.5,), std=(0.25,)),
                       optim=OptimConfig(epochs=5, lr=lr))  # fmt: skip
    torch.manual_seed(seed)
    return FinishedRun(seed, VisionTransformer(model), config, dict(curves))


def make_batches(count: int = 26, size: int = 9) -> list[Batch]:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 1, SIDE, SIDE), dtype=np.uint8)
    labels = generator.integers(0, 3, count)
    labels[min(4, count - 1)] = SKIPPED_LABEL
    places = range(0, count, size)
    return [Batch(row, images[i : i + size], labels[i : i + size]) for row, i in enumerate(places)]


OPTIONS = CompareOptions(batch_size=8, noise_images=9, similarity_images=24, robustness_images=8, resamples=100,
                         speed_rounds=3)  # fmt: skip


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    recorded = {"val/top1": [(10, 30.0), (20, 45.0)], "lambda/layer_00": [(10, 0.2), (20, 0.3)]}
    arms = {
        "plain": [make_run("softmax", seed) for seed in (0, 1)],
        "V1 <b>": [make_run("diff", seed, **recorded) for seed in (0, 1)],
        "V2": [make_run("diff_v2", seed, lr=2e-3) for seed in (0, 1)],
    }
    return compare(arms, make_batches(), OPTIONS)


@pytest.mark.parametrize(("used", "sizes"), [(16, [5, 5, 6]), (15, [5, 5, 5]), (19, [5, 5, 5, 4]), (18, [5, 5, 8]),
                                             (4, [4])])  # fmt: skip
def test_regrouped_batches_keep_order_and_are_never_too_small(used: int, sizes: list[int]) -> None:
    count = used + 3
    images = np.arange(count, dtype=np.uint8)[:, None, None, None]
    labels = np.arange(count)
    labels[[0, 3, count - 1]] = SKIPPED_LABEL
    batches = [Batch(i, images[i : i + 3], labels[i : i + 3]) for i in range(0, count, 3)]
    groups = list(regroup(batches, 5))
    assert [len(group.labels) for group in groups] == sizes
    together = np.concatenate([group.images for group in groups]).ravel()
    assert together.tolist() == [i for i in range(count) if i not in (0, 3, count - 1)]
    assert together.tolist() == np.concatenate([group.labels for group in groups]).tolist()


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 validation images, got 3"):
        list(regroup(make_batches(count=4), 8))


def test_curves_come_back_in_order(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step, value in ((3, 1.5), (7, 2.5), (5, 2.0)):
            writer.add_scalar("val/top1", value, step)
    assert read_curves(tmp_path) == {"val/top1": [(3, 1.5), (5, 2.0), (7, 2.5)]}
    with pytest.raises(FileNotFoundError, match="holds no TensorBoard events"):
        read_curves(tmp_path / "nowhere")


def test_a_run_comes_back_with_its_last_weights(tmp_path: Path) -> None:
    run = make_run("diff", 3)
    folder = tmp_path / run.config.name
    last, best = folder / "checkpoint_2", folder / "checkpoint_1"
    for checkpoint, model in ((best, make_run("diff", 4).model), (last, run.model)):
        checkpoint.mkdir(parents=True)
        save_file(model.state_dict(), checkpoint / WEIGHTS_NAME)
        write_manifest(checkpoint, {})
    (folder / "config.json").write_text(to_json(run.config))
    results = {"status": "finished", "best": {"checkpoint": best.name}, "last": {"checkpoint": last.name}}
    (folder / "results.json").write_text(json.dumps(results))
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        writer.add_scalar("val/top1", 50.0, 9)
    loaded = load_run(folder)
    assert (loaded.seed, loaded.config, loaded.curves) == (3, run.config, {"val/top1": [(9, 50.0)]})
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    (folder / "tensorboard").rename(folder / "tidied away")
    assert load_run(folder).curves == {}
    (folder / "results.json").write_text(json.dumps(results | {"status": "interrupted"}))
    with pytest.raises(ValueError, match=r"only finished runs can be compared, .* is interrupted"):
        load_run(folder)
    with pytest.raises(ValueError, match=r"not a finished run: it has no results\.json"):
        load_run(tmp_path)


def test_speed_is_told_as_a_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0, "calls": 0}

    class Costs(torch.nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clock["now"] += self.seconds * (1 + clock["calls"] // 2)  # the machine is slower in every round
            clock["calls"] += 1
            return x

    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock["now"])
    found = speed.inference_speed({"one": Costs(0.5), "three": Costs(1.5)}, torch.zeros(7, 2), rounds=5)
    assert clock["calls"] == 2 * (1 + 5)
    assert found["one"]["ratio_to_first"] == pytest.approx({"median": 1, "low": 1, "high": 1})
    assert found["three"]["ratio_to_first"] == pytest.approx({"median": 3, "low": 3, "high": 3})
    # rounds are 2 to 6 times as slow as the one that is not counted: 2 s of 7 images in the median
    assert found["one"]["images_per_second"] == pytest.approx(7 / 2)


def test_similarity_tells_floor_from_arms() -> None:
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(200, 6, generator=generator), torch.randn(200, 6, generator=generator)

    def run(signal: torch.Tensor, noise: float) -> dict[str, dict[str, torch.Tensor]]:
        return {"s": {str(i): signal + noise * torch.randn(200, 6, generator=generator) for i in range(3)}}

    similarity = Similarity()
    similarity.update(
        {("a", 0): run(x, 0.2), ("a", 7): run(x, 0.2), ("b", 0): run(x + other, 0.2), ("b", 1): run(x + other, 0.2)}
    )
    records = {(r["kind"], r["arm_a"], r["arm_b"]): r for r in similarity.compute()}
    assert set(records) == {("within", "a", "a"), ("floor", "a", "a"), ("across", "a", "b"), ("within", "b", "b"),
                            ("floor", "b", "b")}  # fmt: skip
    assert records["within", "a", "a"]["same_depth"] == pytest.approx([1, 1, 1])
    assert records["within", "a", "a"]["pairs"] == 2
    assert records["across", "a", "b"]["pairs"] == 3  # a0 and b0 have a seed in common
    assert min(records["floor", "a", "a"]["same_depth"]) > 0.85 > 0.7 > max(records["across", "a", "b"]["same_depth"])
    assert len(records["across", "a", "b"]["matrix"]) == 3
    single = Similarity()
    single.update({("a", 0): run(x, 0.2), ("b", 0): run(x, 0.2)})
    assert [r["pairs"] for r in single.compute() if r["kind"] == "across"] == [1]  # where there is no other pair


def test_a_comparison_is_plain_json(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["images"], result["noise_images"], result["similarity_images"]) == (25, 16, 25)
    assert result["robustness_images"] == 8
    assert result["baseline"] == "plain"


def test_accuracy_of_a_comparison_is_that_of_the_models(result: dict[str, Any]) -> None:
    batches = make_batches()
    images, labels = (np.concatenate([getattr(b, name) for b in batches]) for name in ("images", "labels"))
    used = labels != SKIPPED_LABEL
    model = make_run("diff", 1).model.eval()
    with torch.no_grad():
        logits = model((torch.from_numpy(images[used]) / 255 - 0.5) / 0.25)
    right = (logits.argmax(1) == torch.from_numpy(labels[used])).double().mean()
    arm = result["arms"]["V1 <b>"]
    assert arm["top1"]["per_seed"][1] == pytest.approx(100 * right.item())
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[used]))
    assert arm["negative_log_likelihood"]["per_seed"][1] == pytest.approx(loss.item(), rel=1e-4)
    plain = result["arms"]["plain"]
    assert arm["top1_difference"]["difference"] == pytest.approx(arm["top1"]["mean"] - plain["top1"]["mean"])
    assert plain["top1_difference"] is None


def test_parts_of_a_comparison(result: dict[str, Any]) -> None:
    plain, v1, v2 = result["arms"].values()
    assert (v1["num_heads"], v1["seeds"], v1["variant"]) == (1, [0, 1], "diff")
    assert v1["differences"]["intended"] == {"model.variant": ["softmax", "diff"], "model.num_heads": [2, 1]}
    assert v1["differences"]["also"] == {}
    assert v2["differences"]["also"] == {"optim.lr": [1e-3, 2e-3]}
    assert v2["parameters_to_baseline"] > 1.05
    assert [len(v1["robustness"][kind]) for kind in CORRUPTIONS] == [4, 4, 4]
    assert np.shape(v1["noise"]["entropy_2"]["per_head"]) == (2, 2, 1)
    assert "entropy_2" not in plain["noise"]
    assert v1["noise"]["head_similarity"]["overall"]["mean"] is None  # a single head
    expected = np.mean([make_run("diff", seed).model.lambdas() for seed in (0, 1)], axis=0)
    assert v1["noise"]["effective_lambda"]["per_layer"] == pytest.approx(expected.tolist(), rel=1e-4)
    assert {r["stream"] for r in result["cka"]} == {
        "class token", "patch mean", "attention output", "MLP output", "patch mean, without high-norm tokens",
        "attention output, without high-norm tokens", "MLP output, without high-norm tokens",
    }  # fmt: skip
    assert result["arms"]["V2"]["speed"]["ratio_to_first"]["median"] > 0
    assert result["arms"]["V2"]["training_speed"]["ratio_to_first"]["median"] > 0
    assert result["arms"]["V2"]["training_flops_per_image"] > result["arms"]["plain"]["training_flops_per_image"]


def test_the_same_arms_do_not_differ() -> None:
    arms = {"one": [make_run("diff", seed) for seed in (0, 1)], "two": [make_run("diff", seed) for seed in (0, 1)]}
    result = compare(arms, make_batches(), dataclasses.replace(OPTIONS, noise_images=1))
    found = result["arms"]["two"]["top1_difference"]
    assert (found["difference"], found["low"], found["high"]) == (0, 0, 0)
    sentences = findings(result)
    assert sentences[0].startswith("two is not shown to differ from one in top-1: +0.00 points")
    assert "not shown to differ by more than the seed" in sentences[1]
    assert not any("on one side" in sentence for sentence in sentences)
    assert sentences[-1] == "2 seeds an arm are few: intervals over so few runs come out too narrow."


def answers_of(model: VisionTransformer, images: Any, labels: Any) -> tuple[Any, Any]:
    """Confidence, and 1 where right."""
    with torch.no_grad():
        found = model((torch.from_numpy(images) / 255 - 0.5) / 0.25).double().softmax(1).max(1)
    return found.values.numpy(), (found.indices.numpy() == labels).astype(float)


def test_arms_are_asked_about_the_same_worsened_images_and_scored_by_hand() -> None:
    arms = {name: [make_run("diff", 0)] for name in ("one", "two")}
    found = compare(arms, make_batches(), OPTIONS)["arms"]
    assert found["one"]["robustness"] == found["two"]["robustness"]
    model = make_run("diff", 0).model.eval()
    groups = list(regroup(make_batches(), OPTIONS.batch_size))
    first = groups[0]
    for kind in CORRUPTIONS:
        clean, *worse = (severity["per_seed"][0] for severity in found["one"]["robustness"][kind])
        assert clean == pytest.approx(100 * answers_of(model, first.images, first.labels)[1].mean())
        for severity, top1 in enumerate(worse, start=1):
            images = corrupt(first.images, kind, severity, patch_size=3, seed=OPTIONS.seed)
            assert top1 == pytest.approx(100 * answers_of(model, images, first.labels)[1].mean())
    answers = [answers_of(model, group.images, group.labels) for group in groups]
    confidence, right = (np.concatenate(part) for part in zip(*answers, strict=True))
    expected = calibration_error(confidence, right)
    assert found["one"]["calibration_error"]["mean"] == pytest.approx(expected, rel=1e-4)
    assert _worsened(found["one"])["mean"] == pytest.approx(
        np.mean([s["mean"] for kind in CORRUPTIONS for s in found["one"]["robustness"][kind][1:]])
    )


def test_the_largest_is_that_of_the_largest_head(result: dict[str, Any]) -> None:
    found = result["arms"]["plain"]["noise"]["largest_logit"]
    per_head = np.array(found["per_head"])  # (S, L, H)
    assert found["per_layer"] == pytest.approx(per_head.max(2).mean(0).tolist())
    assert found["overall"]["per_seed"] == pytest.approx(per_head.max(2).mean(1).tolist())
    entropy = result["arms"]["plain"]["noise"]["entropy_1"]
    assert entropy["per_layer"] == pytest.approx(np.array(entropy["per_head"]).mean((0, 2)).tolist())


def test_high_norm_tokens_are_those_above_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The six of a group's sixteen patches whose norm is largest: they get their share, and means go without them."""
    arms = {"one": [make_run("softmax", seed) for seed in (0, 1)]}
    found = {}
    for name, share in (("none", 1.0), ("some", 0.6)):
        monkeypatch.setattr(measure, "high_norm_threshold", lambda norms, share=share: norms.quantile(share).item())
        found[name] = compare(arms, make_batches(), OPTIONS)
    none, some = (result["arms"]["one"] for result in found.values())
    assert none["high_norm_share"]["mean"] < 0.1 < 0.3 < some["high_norm_share"]["mean"] < 0.5
    assert none["noise"]["high_norm_mass"]["overall"]["mean"] < 0.1 < some["noise"]["high_norm_mass"]["overall"]["mean"]
    streams = {
        name: {r["stream"]: r["matrix"] for r in result["cka"] if r["kind"] == "floor"}
        for name, result in found.items()
    }
    without = "patch mean, without high-norm tokens"
    assert streams["some"]["patch mean"] == streams["none"]["patch mean"]
    assert np.abs(np.subtract(streams["some"][without], streams["some"]["patch mean"])).max() > 0.01


def test_an_image_whose_query_sees_no_patch_does_not_erase_the_figure() -> None:
    A = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    A[0, 0, 0] = torch.tensor([0.5, 0.3, 0.2])  # class token, then two patches
    A[1, 0, 0] = torch.tensor([1.0, 0.0, 0.0])
    inside = torch.tensor([[True, False], [True, False]])
    found = {name: (above / below).item() for name, (above, below) in _inside(A, inside, 1, class_token=True).items()}
    assert found == pytest.approx({"inside_mass": 0.6, "inside_lift": 0.6 / 0.5})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a$1_$2", "cost $5", r"x^2$\\frac$"])
def test_names_are_drawn_as_they_are(result: dict[str, Any], name: str, tmp_path: Path) -> None:
    """Between two dollars matplotlib would read a formula, and end where it is none."""
    arms = {f"V1 {name}" if arm.startswith("V1") else arm: found for arm, found in result["arms"].items()}
    write_report({**result, "arms": arms, "cka": []}, draw({**result, "arms": arms, "cka": []}), tmp_path)
    assert (tmp_path / "report.html").exists()
    confusion_figure(np.array([[1, 2], [3, 4]]), [name, "b"]).savefig(tmp_path / "confusion.png")


def test_runs_in_other_precisions_are_other_arms() -> None:
    one, other = make_run("diff", 0), make_run("diff", 1)
    scale = dataclasses.replace(other.config.scale, precision="bf16")
    other = dataclasses.replace(other, config=dataclasses.replace(other.config, scale=scale))
    arms: dict[str, list[FinishedRun]] = {}
    for run in (one, other):
        arms.setdefault(_name(run, arms), []).append(run)
    assert len(arms) == 2
    with pytest.raises(ValueError, match=r"nothing but the seed, got scale.precision: 'auto' and 'bf16' in 'a'"):
        check_arms({"a": [one, other]})


def test_options_of_the_attention_are_what_a_comparison_is_of() -> None:
    one = make_run("diff", 0)
    model = dataclasses.replace(one.config.model, lambda_max=1.0, head_norm="layer")
    found = differences(one, dataclasses.replace(one, config=dataclasses.replace(one.config, model=model)))
    assert found == {"intended": {"model.lambda_max": [None, 1.0], "model.head_norm": ["rms", "layer"]}, "also": {}}


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one run each, got \{'a': 0\}"):
        check_arms({"a": []})
    with pytest.raises(ValueError, match=r"different seeds, got \[3, 3\] in 'a'"):
        check_arms({"a": [make_run("diff", 3), make_run("diff", 3)]})
    with pytest.raises(ValueError, match=r"nothing but the seed, got optim.lr: 0.001 and 0.1 in 'a'; make it two arms"):
        check_arms({"a": [make_run("diff", 0), make_run("diff", 1, lr=0.1)]})
    other = make_run("softmax", 0)
    other = dataclasses.replace(
        other, config=dataclasses.replace(other.config, data=dataclasses.replace(other.config.data, path="elsewhere"))
    )
    with pytest.raises(ValueError, match=r"same images, got data.path: 'sample' and 'elsewhere' in 'a' and 'b'"):
        check_arms({"a": [make_run("diff", 0)], "b": [other]})
    bicubic = dataclasses.replace(other.config, data=DataConfig(mean=(0.5,), std=(0.25,)))
    bicubic = dataclasses.replace(bicubic, augment=dataclasses.replace(bicubic.augment, interpolation="bicubic"))
    with pytest.raises(ValueError, match=r"augment.interpolation: 'bilinear' and 'bicubic' in 'a' and 'b'; compare"):
        check_arms({"a": [make_run("diff", 0)], "b": [dataclasses.replace(other, config=bicubic)]})
    assert differences(make_run("diff", 0), make_run("diff", 1)) == {"intended": {}, "also": {}}


def test_arms_of_one_variant_and_name_are_numbered() -> None:
    arms: dict[str, list[FinishedRun]] = {}
    for lr in (0.1, 0.2, 0.3, 0.4):
        run = make_run("diff", 0, lr=lr)
        arms.setdefault(_name(run, arms), []).append(run)
    assert list(arms) == ["Diff-ViT V1", "Diff-ViT V1 (diff-0)", "Diff-ViT V1 (diff-0, 2)", "Diff-ViT V1 (diff-0, 3)"]


def test_arms_of_other_depths_and_single_seeds() -> None:
    arms = {"two": [make_run("softmax", 0)], "three": [make_run("softmax", 0, depth=3)]}
    result = compare(arms, make_batches(), OPTIONS)
    across = next(r for r in result["cka"] if r["kind"] == "across")
    assert np.shape(across["matrix"]) == (2, 3)
    assert across["same_depth"] is None
    text = "\n".join(findings(result))
    assert "three and two have other depths" in text
    assert "single run says nothing" in text
    assert "one seed" not in text


def test_activations_that_do_not_differ_are_not_taken_for_other_depths(result: dict[str, Any]) -> None:
    lost = [{**r, "same_depth_by_pair": r["same_depth_by_pair"] and [None] * r["pairs"]} for r in result["cka"]]
    text = "\n".join(findings({**result, "cka": lost}))
    assert "not compared by CKA: activations of one do not differ between images" in text
    assert "other depths" not in text


class Page(HTMLParser):
    """What a browser would load and show."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.slow
def test_the_report_stands_alone(result: dict[str, Any], tmp_path: Path) -> None:
    write_result(result, tmp_path / "out")
    path = write_report(result, draw(result), tmp_path / "out")
    assert path == tmp_path / "out" / "report.html"
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == result
    page = Page(path.read_text(encoding="utf-8"))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) > 15
    for image in images:
        source = image["src"] or ""
        assert source.startswith("data:image/svg+xml;base64,")
        assert b"<svg" in base64.b64decode(source.split(",")[1])
        assert image["alt"]
    figures = tmp_path / "out" / "figures"
    assert len(list(figures.glob("*.svg"))) == len(images)
    (figures / "boxes_0.svg").write_text("of an earlier comparison")
    (figures / "mine.svg").write_text("mine")
    (figures / "cka_matrices_20.svg").write_text("of an earlier comparison of more arms")
    write_report(result, draw(result), tmp_path / "out")
    assert len(list(figures.glob("*.svg"))) == len(images) + 1
    assert (figures / "mine.svg").exists()
    loaded = [a.get("src") or a.get("href") for tag, a in page.tags if tag in ("script", "link", "iframe")]
    assert loaded == []
    assert not re.search(r"url\(|@import", path.read_text(encoding="utf-8"))
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    shown = sum(tag == "figure" for tag, _ in page.tags)
    assert shown == sum(tag == "figcaption" for tag, _ in page.tags) >= 7


def test_the_report_says_what_was_found(result: dict[str, Any]) -> None:
    html = render(result, [])
    text = " ".join(Page(html).text.split())
    for sentence in findings(result):
        assert sentence in text
    v1 = result["arms"]["V1 <b>"]
    assert f"{v1['top1']['mean']:.2f} ± {v1['top1']['std']:.2f}" in text
    assert f"{v1['parameters']:,}" in text
    assert "3 arms, 2 seeds each, asked about the same 25 validation images" in text
    assert "which a fair comparison would keep alike, optim.lr 0.002 (not 0.001)" in text
    assert "V2 has" in text
    assert "more parameters than plain" in text
    assert "V1 <b> beside plain" in text
    assert "<b>V1 <b>" not in html  # names are escaped


def test_runs_are_paired_by_seed_in_whatever_order_they_are_named(result: dict[str, Any]) -> None:
    arms = {
        "plain": [make_run("softmax", seed) for seed in (0, 1)],
        "V2": [make_run("diff_v2", seed, lr=2e-3) for seed in (1, 0)],
    }
    found = compare(arms, make_batches(), OPTIONS)["arms"]["V2"]
    assert found["seeds"] == [0, 1]
    assert found["top1_difference"] == result["arms"]["V2"]["top1_difference"]
    assert found["top1_difference"]["paired_by_seed"] is True


def test_representations_in_bf16_are_as_alike_as_in_float32() -> None:
    """Means over patches are float32 again, whatever the branches that they are of are computed in."""
    found = {}
    for precision in ("fp32", "bf16"):
        options = dataclasses.replace(OPTIONS, precision=precision, batch_size=12)
        result = compare({"plain": [make_run("softmax", 0)], "V1": [make_run("diff", 0)]}, make_batches(), options)
        assert result["similarity_precision"] == precision
        found[precision] = torch.tensor([record["same_depth"] for record in result["cka"]])
    difference = (found["bf16"] - found["fp32"]).abs().max()
    assert 0 < difference < 5e-3


@pytest.mark.parametrize("field", ["batch_size", "noise_images", "speed_rounds", "resamples", "seed"])
def test_options_are_checked(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field} must be at least \d+, got -1"):
        CompareOptions(**{field: -1})


def test_a_spread_in_words() -> None:
    assert spread(mean_and_std([1.0, 2.0, 6.0]), 1) == "3.0 ±\u00a02.6"
    assert spread(mean_and_std([0.125]), 2, 100) == "12.50"
    assert spread({"mean": None, "std": None}, 2) == "–"


def test_images_are_known_by_themselves_and_not_by_their_place() -> None:
    """Where both runs wrote down what they saw."""
    seen = Fingerprint(SplitFingerprint(36, "a" * 64), SplitFingerprint(15, "b" * 64))
    grown = dataclasses.replace(seen, training=SplitFingerprint(40, "c" * 64))
    judged_by_others = dataclasses.replace(seen, validation=SplitFingerprint(15, "c" * 64))

    def run(seed: int, path: str, images: Fingerprint | None) -> FinishedRun:
        made = make_run("diff", seed)
        data = dataclasses.replace(made.config.data, path=path)
        return dataclasses.replace(made, config=dataclasses.replace(made.config, data=data), images=images)

    first = run(0, "/a", seen)
    check_arms({"a": [first, run(1, "/b", seen)]})
    arms: dict[str, list[FinishedRun]] = {"Diff-ViT V1": [first]}
    assert _name(run(1, "/b", seen), arms) == "Diff-ViT V1"
    assert _name(run(1, "/a", grown), arms) == "Diff-ViT V1 (diff-1)"
    with pytest.raises(ValueError, match=r"images: '36 \(aaaaaaaa\)' and '40 \(cccccccc\)' in 'a'; make it"):
        check_arms({"a": [first, run(1, "/a", grown)]})
    check_arms({"a": [first], "b": [run(1, "/b", grown)]})  # asked about the same images, trained on others
    assert list(differences(first, run(0, "/b", grown))["also"]) == ["training images"]
    with pytest.raises(ValueError, match=r"the same images, got validation images: '15 \(bbbbbbbb\)' and"):
        check_arms({"a": [first], "b": [run(1, "/a", judged_by_others)]})
    with pytest.raises(ValueError, match=r"got data\.path: '/a' and '/b'"):
        check_arms({"a": [first], "b": [run(1, "/b", None)]})
