"""A model as a shard is told it: what its answers depend on, and where and how fast it runs."""

from typing import Any, Literal, Self

from megadistill.config.refine import ChatModelConfig, EndpointConfig, ServedConfig
from megadistill.launch.shards import Runtime, ShardArguments, fingerprint
from megadistill.resolve import local


class ModelArgument(ShardArguments):
    """One of a configuration's `systems` or `models`."""

    name: Runtime[str]
    identity: dict[str, Any]  # plain JSON values
    config: Runtime[ChatModelConfig]

    @classmethod
    def of(cls, name: str, config: ChatModelConfig) -> Self:
        identity: dict[str, Any]
        if isinstance(config, EndpointConfig):
            identity = {"model": config.model, "extra_body": config.extra_body}
        else:
            identity = {
                "model": model_hash(config.path),
                "precision": config.precision,
                "context": config.max_model_len,
                "extra_body": config.extra_body,
                "options": config.options,
            }
        return cls(name=name, identity=identity, config=config)

    @property
    def served(self) -> ServedConfig:
        """Of a model that is no endpoint."""
        assert isinstance(self.config, ServedConfig)
        return self.config

    @property
    def gpus(self) -> int:
        """Those that a shard needs to serve it."""
        return gpus_of(self.config)


def gpus_of(config: ChatModelConfig) -> int:
    """GPUs of a model that a shard serves."""
    return config.engine.tp if isinstance(config, ServedConfig) else 0


def model_hash(name: str, kind: Literal["model", "encoder"] = "model") -> str:
    """Identifies a model's files; a hub name stands for itself."""
    directory = local(kind, name)
    return name if directory is None else fingerprint(directory)
