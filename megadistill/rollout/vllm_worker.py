"""Runs inside each vLLM worker: receives published weights through vLLM's own control plane.

vLLM imports this module in every worker because `WorkerExtension` is the engine's
`worker_extension_cls`; that registers the transfer backend.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from megadistill.publish.checksum import Checksum

BACKEND = "megadistill_files"


# vLLM is not type-checked, so its classes have type Any: hence the ignores below.
@dataclass
class FilesInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Files need no set-up."""


@dataclass
class FilesUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """What one update loads."""

    files: list[str] = field(default_factory=list)
    """Safetensors files in Hugging Face's names, together the whole model."""


class FilesTransfer(WeightTransferEngine[FilesInit, FilesUpdate]):  # type: ignore[misc]
    """Streams safetensors into the running model, layer by layer, and sums what it read."""

    init_info_cls = FilesInit
    update_info_cls = FilesUpdate

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # vLLM's arguments, passed through
        super().__init__(*args, **kwargs)
        self._sum = Checksum()
        self._expected: set[str] = set()
        self._loaded: set[str] = set()

    @property
    def checksum(self) -> str:
        return self._sum.hexdigest()

    def init_transfer_engine(self, init_info: FilesInit) -> None:
        pass

    def start_weight_update(self) -> None:
        self._sum, self._loaded = Checksum(), set()
        # Now, since a tied head is listed once only while it shares its embedding's tensor.
        self._expected = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FilesUpdate) -> None:
        self._loaded |= self.model.load_weights(self._tensors(update_info.files))

    def finish_weight_update(self) -> None:
        if missing := self._expected - self._loaded:
            raise ValueError(
                f"published weights lack {len(missing)} parameters, e.g. {sorted(missing)[:3]}"
            )
        finalize_layerwise_reload(self.model, self.model_config)
        if self.model_config.hf_text_config.tie_word_embeddings:
            # vLLM reprocesses only layers that received tensors. A tied head receives none, and
            # on a CPU it would go on multiplying with a packed copy of the old embedding.
            head = self.model.get_submodule("lm_head")
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        pass

    def _tensors(self, files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for file in files:
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 - not a mapping
                    tensor = reader.get_tensor(name)
                    self._sum.add(name, tensor)
                    yield name, tensor


WeightTransferEngineFactory.register_engine(BACKEND, FilesTransfer)


class WorkerExtension:
    """Methods that the engine may call on every worker."""

    weight_transfer_engine: FilesTransfer

    def received_checksum(self) -> str:
        """Checksum of the last published weights, over the tensors this worker read."""
        return self.weight_transfer_engine.checksum
