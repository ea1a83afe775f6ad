"""The Trainer of Hugging Face: a small GPT-2 learns this repository's LICENSE letter by letter, with ASAM.

pip install transformers accelerate
python -m examples.trainers.transformers_text
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers

from sam_kernels.trainers.transformers import SAMTrainerMixin

TEXT = Path(__file__).resolve().parents[2] / "LICENSE"
LENGTH = 64


class SAMTrainer(SAMTrainerMixin, transformers.Trainer):
    pass


def rows() -> tuple[list[dict[str, torch.Tensor]], int]:
    """Return the text in pieces of 64 letters, and how many different letters there are."""
    text = TEXT.read_text()
    numbers = {letter: number for number, letter in enumerate(sorted(set(text)))}
    letters = torch.tensor([numbers[letter] for letter in text])
    pieces = letters[: len(letters) // LENGTH * LENGTH].split(LENGTH)
    return [{"input_ids": piece, "labels": piece} for piece in pieces], len(numbers)


def main(epochs: int = 10) -> list[float]:
    """Train, and return the loss of every epoch."""
    torch.set_num_threads(1)  # so small a model waits for a second thread longer than it computes
    transformers.set_seed(0)
    train, letters = rows()
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        vocab_size=letters, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, **no_dropout
    )
    model = transformers.GPT2LMHeadModel(config)
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            num_train_epochs=epochs,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=5e-3,
            logging_strategy="epoch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = SAMTrainer(model, args, train_dataset=train, sam={"recipe": "asam", "rho": 0.2})
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for epoch, loss in enumerate(losses):
        print(f"epoch {epoch}: training loss {loss:.3f} nats a letter")
    return losses


if __name__ == "__main__":
    main()
