"""Models to talk to, behind endpoints or served here while they are needed."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megadistill.config.refine import ChatModelConfig, EndpointConfig, ServedConfig
from megadistill.refine.endpoints import ChatModel, open_endpoint
from megadistill.refine.serving import served


@contextmanager
def opened(
    models: Mapping[str, ChatModelConfig], *, gpu: bool, logs: Path
) -> Iterator[dict[str, ChatModel]]:
    """Models by name, those of kind `serve` served side by side while the block lasts."""
    own = {name: model for name, model in models.items() if isinstance(model, ServedConfig)}
    with ExitStack() as stack:
        chats = dict(stack.enter_context(served(own, gpu=gpu, logs=logs))) if own else {}
        for name, model in models.items():
            if isinstance(model, EndpointConfig):
                chats[name] = open_endpoint(name, model)
        yield chats
