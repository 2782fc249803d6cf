import pytest
import torch

from diffvit.data.batches import SKIPPED_LABEL
from diffvit.training.metrics import Sums, summed_cross_entropy


def test_sums_by_hand_and_over_batches() -> None:
    logits = torch.tensor(
        [
            [9.0, 8, 7, 6, 5, 4, 3],  # label 0: first
            [9.0, 8, 7, 6, 5, 4, 3],  # label 4: fifth
            [9.0, 8, 7, 6, 5, 4, 3],  # label 5: sixth
            [9.0, 8, 7, 6, 5, 4, 3],  # skipped
        ]
    )
    labels = torch.tensor([0, 4, 5, SKIPPED_LABEL])
    sums = Sums(torch.device("cpu"))
    sums.add(torch.tensor(1.5), logits[:1], labels[:1])
    sums.add(torch.tensor(4.5), logits[1:], labels[1:])
    means = sums.read()
    assert means == {
        "loss": 2.0,
        "top1": pytest.approx(100 / 3),
        "top5": pytest.approx(200 / 3),
        "images": 3,
        "skipped": 1,
        "votes": 0,
    }
    assert sums.read()["images"] == 0


def test_fewer_than_five_classes() -> None:
    sums = Sums(torch.device("cpu"))
    sums.add(torch.tensor(0.0), torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0]))
    means = sums.read()
    assert (means["top1"], means["top5"]) == (0, 100)


def test_skipped_samples_have_no_loss_and_no_gradient() -> None:
    logits = torch.zeros(3, 4, requires_grad=True)
    loss = summed_cross_entropy(logits, torch.tensor([1, SKIPPED_LABEL, 2]))
    loss.backward()
    assert loss.item() == pytest.approx(2 * torch.log(torch.tensor(4.0)).item())
    assert logits.grad is not None
    assert logits.grad[1].tolist() == [0, 0, 0, 0]
    assert logits.grad[0].tolist() == pytest.approx([0.25, -0.75, 0.25, 0.25])
