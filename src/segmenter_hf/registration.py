"""Registers the models with the Auto classes of transformers as soon as these are loaded, and not before.

So `import segmenter_hf` loads neither torch nor transformers, and `import segmenter_hf; from transformers import pipeline` works.
"""

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


AUTO_CLASSES = "transformers.models.auto.configuration_auto"  # every Auto class imports it


class RegisterWithTransformers(MetaPathFinder):
    """Finds no module by itself: imports [`segmenter_hf.models`] after the import that has loaded the Auto classes.

    Modules of transformers import each other, the Auto classes among them, so it waits for the end of the outermost import.
    """

    def __init__(self) -> None:
        self._state = threading.local()

    def install(self) -> None:
        """Wait for the Auto classes, or register at once where they are there."""
        if AUTO_CLASSES in sys.modules:
            importlib.import_module(f"{__package__}.models")
        else:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders have, which registers the models after it has been run."""
        if not fullname.startswith("transformers.") or getattr(self._state, "is_importing", False):
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        loader, exec_module = spec.loader, spec.loader.exec_module

        def exec_module_and_register(module: ModuleType) -> None:
            del loader.exec_module
            self._state.is_importing = True
            try:
                exec_module(module)
            finally:
                self._state.is_importing = False
            if AUTO_CLASSES in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                importlib.import_module(f"{__package__}.models")

        loader.exec_module = exec_module_and_register  # type: ignore[method-assign]
        return spec
