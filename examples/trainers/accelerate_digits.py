"""accelerate: a loop of one's own, with batches in two parts.

pip install accelerate scikit-learn
python -m examples.trainers.accelerate_digits
accelerate launch --cpu --num_processes 2 -m examples.trainers.accelerate_digits
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from examples.trainers.data import accuracy, digits, network
from sam_kernels import SAM
from sam_kernels.trainers.accelerate import step


def main(epochs: int = 8) -> float:
    """Train, and return the test accuracy in percent."""
    torch.set_num_threads(1)  # so small a model waits for a second thread longer than it computes
    accelerator = Accelerator(cpu=True)
    train, test = digits()
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.2, momentum=0.9, model=model)
    loader = DataLoader(TensorDataset(*train), batch_size=25, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def loss_fn(batch):
        x, y = batch
        return cross_entropy(model(x), y)

    for epoch in range(epochs):
        losses, parts = [], []
        for batch in loader:
            parts.append(batch)
            if len(parts) == 2:
                losses += step(accelerator, optimizer, model, loss_fn, parts)
                parts = []
        accelerator.print(f"epoch {epoch}: training loss {torch.stack(losses).mean():.4f}")
    result = accuracy(accelerator.unwrap_model(model), *test)
    accelerator.print(f"test accuracy {result:.1f} %")
    return result


if __name__ == "__main__":
    main()
