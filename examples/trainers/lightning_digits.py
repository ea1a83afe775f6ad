"""Lightning: SAM under automatic optimization, with batches in two parts.

    pip install lightning scikit-learn
    python -m examples.trainers.lightning_digits

Without accumulation the callback may be left out. With it the callback is what makes both gradients those of
both parts; it refuses settings under which a step would not be SAM, and keeps the loss at perturbed weights
out of the log.
"""

from __future__ import annotations

import logging

import lightning.pytorch as pl
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from examples.trainers.data import accuracy, digits, network
from sam_kernels import SAM
from sam_kernels.trainers.lightning import SAMCallback


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = cross_entropy(self.net(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        print(f"epoch {self.current_epoch}: training loss {self.trainer.callback_metrics['loss']:.4f}")

    def configure_optimizers(self):
        opt = SAM(self.parameters(), torch.optim.SGD, rho=0.05, lr=0.2, momentum=0.9, model=self)
        return [opt], [torch.optim.lr_scheduler.CosineAnnealingLR(opt, self.trainer.max_epochs)]


def main(epochs: int = 8) -> float:
    """Train, and return the test accuracy in percent."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # so small a model waits for a second thread longer than it computes
    train, test = digits()
    module = Digits()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[SAMCallback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(*train), batch_size=25, shuffle=True))
    result = accuracy(module.net, *test)
    print(f"test accuracy {result:.1f} % after {trainer.global_step} steps")
    return result


if __name__ == "__main__":
    main()
