"""Reading a published snapshot by running the code inside it.

Only for files whose author is trusted: this is Python's own unpickler, and the file's source is
executed. It is for networks whose class is not ours (variants with changed source). Published
sources import three packages of their training repositories. Small stand-ins offer what such
sources use of them, while the file is being read.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from erk_guid.common.errors import CheckpointError
from erk_guid.models.checkpoints.build import bind, build_encoder
from erk_guid.models.encoders import ENCODERS


class EasyDict(dict):
    """A dict whose items are also attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]


def read_trusted(path: Path) -> dict[str, Any]:
    """Unpickle `path` as its own program does, executing the source inside.

    Raises:
        CheckpointError: it cannot be read that way either, or holds no network 'ema'.
    """
    with _stand_ins() as sources, open(path, "rb") as file:
        try:
            data = _Unpickler(file, sources).load()
        except Exception as error:  # the file's own code may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"running the code inside it failed ({reason[:200]})") from error
    if not isinstance(data, dict) or not isinstance(data.get("ema"), torch.nn.Module):
        raise CheckpointError("it is no network snapshot: it holds no network 'ema'")
    return dict(data)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, sources: _Sources) -> None:
        super().__init__(file)
        self._sources = sources

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch_utils.persistence", "_reconstruct_persistent_obj"):
            return self._sources.reconstruct
        return super().find_class(module, name)


class _Sources:
    """Modules made from the source text in a file, one for each distinct text."""

    def __init__(self) -> None:
        self._modules: dict[str, types.ModuleType] = {}

    def reconstruct(self, meta: dict[str, Any]) -> Any:
        if meta["class_name"] in ENCODERS:
            # Ours computes the same, and does not need the training repository later.
            state = meta["state"]
            args, kwargs = state.get("_init_args", ()), state.get("_init_kwargs", {})
            cls = ENCODERS[meta["class_name"]]
            return build_encoder(meta["class_name"], bind(cls, list(args), kwargs))
        source = meta["module_src"]
        if source not in self._modules:
            name = f"_erk_guid_trusted_{len(self._modules)}"
            module = types.ModuleType(name)
            # Some classes, such as dataclasses, look up their module by name.
            sys.modules[name] = module
            exec(
                compile(source, f"<{meta['class_name']} in the snapshot>", "exec"), module.__dict__
            )
            self._modules[source] = module
        cls = getattr(self._modules[source], meta["class_name"])
        obj = cls.__new__(cls)
        set_state = getattr(obj, "__setstate__", None)
        if set_state is not None:
            set_state(meta["state"])
        else:
            obj.__dict__.update(meta["state"])
        return obj


@contextlib.contextmanager
def _stand_ins() -> Iterator[_Sources]:
    """Install the stand-in packages, and remove them when the block ends."""
    sources = _Sources()

    def package(name: str, **members: Any) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__dict__.update(members)
        return module

    persistence = package(
        "torch_utils.persistence",
        persistent_class=lambda cls: cls,
        is_persistent=lambda obj: False,
        import_hook=lambda hook: None,
        _reconstruct_persistent_obj=sources.reconstruct,
    )
    misc = package(
        "torch_utils.misc",
        constant=_constant,
        const_like=_const_like,
        assert_shape=_assert_shape,
        profiled_function=lambda fn: fn,
        suppress_tracer_warnings=warnings.catch_warnings,
        nan_to_num=torch.nan_to_num,
        named_params_and_buffers=_named_params_and_buffers,
        params_and_buffers=lambda module: [t for _, t in _named_params_and_buffers(module)],
    )
    util = package("dnnlib.util", EasyDict=EasyDict)
    modules = {
        "torch_utils": package("torch_utils", persistence=persistence, misc=misc, __path__=[]),
        "torch_utils.persistence": persistence,
        "torch_utils.misc": misc,
        "dnnlib": package("dnnlib", util=util, EasyDict=EasyDict, __path__=[]),
        "dnnlib.util": util,
    }
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield sources
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def _constant(
    value: Any,
    shape: Any = None,
    dtype: torch.dtype | None = None,
    device: Any = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor:
    made = torch.as_tensor(value, dtype=dtype or torch.get_default_dtype(), device=device)
    return (made if shape is None else made.expand(shape)).contiguous(memory_format=memory_format)


def _const_like(
    ref: torch.Tensor, value: Any, shape: Any = None, dtype: Any = None
) -> torch.Tensor:
    return _constant(value, shape=shape, dtype=dtype or ref.dtype, device=ref.device)


def _assert_shape(tensor: torch.Tensor, shape: Any) -> None:
    wrong = tensor.ndim != len(shape) or any(
        want is not None and have != int(want)
        for have, want in zip(tensor.shape, shape, strict=False)
    )
    if wrong:
        raise AssertionError(f"expected shape {list(shape)}, got {list(tensor.shape)}")


def _named_params_and_buffers(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
