"""The divergence from the teacher against its definition, with gradients, and where it must be nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

from tests.trainer.runs import tiny_base
from trainer.batches import make_batch
from trainer.distill.conversations import Conversation
from trainer.distill.objective import DistillationLoss, divergence
from trainer.distill.studied_example import StudiedExample
from trainer.distill.teacher import top_k_logits


def top(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    best = logits.log_softmax(-1).topk(k)
    return best.indices, best.values


def test_with_all_tokens_but_one_it_is_the_whole_divergence() -> None:
    generator = torch.Generator().manual_seed(1)
    teacher, student = (torch.randn(5, 11, generator=generator).double() for _ in range(2))

    found = divergence(student, *top(teacher, 10))

    whole = kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)


def test_fewer_tokens_see_less_of_it_and_never_less_than_nothing() -> None:
    generator = torch.Generator().manual_seed(2)
    teacher, student = (torch.randn(50, 11, generator=generator).double() for _ in range(2))

    seen = [divergence(student, *top(teacher, k)) for k in (1, 3, 10)]

    assert bool((seen[0] >= 0).all())
    assert bool((seen[0] <= seen[1] + 1e-12).all())
    assert bool((seen[1] <= seen[2] + 1e-12).all())


def test_it_is_nothing_exactly_where_the_student_is_the_teacher() -> None:
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(5, 11, generator=generator).double().requires_grad_()

    found = divergence(teacher, *(part.detach() for part in top(teacher, 4)))
    found.sum().backward()  # type: ignore[no-untyped-call] # torch has no types for it

    torch.testing.assert_close(found.detach(), torch.zeros(5).double(), rtol=0, atol=1e-12)
    assert teacher.grad is not None
    assert float(teacher.grad.abs().max()) < 1e-12


def test_a_teacher_that_is_certain_leaves_no_rest_and_no_nan() -> None:
    certain = torch.tensor([[0.0, -200.0, -300.0]])
    student = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)

    found = divergence(student, torch.tensor([[0, 1]]), certain[:, :2])
    found.sum().backward()  # type: ignore[no-untyped-call] # torch has no types for it

    assert float(found.detach()) == pytest.approx(-float(student.detach().log_softmax(-1)[0, 0]))
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_its_gradient_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(4)
    teacher = torch.randn(3, 7, generator=generator).double()
    student = torch.randn(3, 7, generator=generator).double().requires_grad_()

    assert torch.autograd.gradcheck(lambda x: divergence(x, *top(teacher, 4)), (student,))


def test_a_prefix_of_the_whole_document_is_the_teacher_at_step_0() -> None:
    """The positions are those of serving: the prompt stands behind the prefix as it stood behind the document."""
    base = tiny_base("llama", double=True)
    document, prompt, answer = (5, 9, 17, 40, 33, 8), (60, 61, 62), (70, 71, 2)
    conversation = Conversation(0, "a", (0, 1), "m", "a", prompt, document + prompt, answer)
    objective = DistillationLoss(top_k_logits(base, [conversation], 20, 1))
    batch = make_batch([StudiedExample(prompt, answer, "", 0)], base.device)

    with torch.no_grad():
        prefix = base.key_values(torch.tensor(document))
        with_prefix = float(objective(base.logits(prefix, batch), batch))
        without = float(objective(base.logits(None, batch), batch))

    assert with_prefix < 1e-6
    assert without > 0.01
