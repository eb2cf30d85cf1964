"""Registration with transformers' Auto classes, without importing transformers for those who do not use it.

`import genarm` must make `AutoModelForCausalLM.from_pretrained(guided_folder)` work, yet transformers takes
seconds to import and `genarm --help` must not wait for it. So `GuidedConfig` is registered when transformers'
own table of configurations has been imported: at once if it already is, otherwise right after. The model follows:
making a `GuidedConfig`, the first thing every Auto class does with a guided folder, imports and registers it.
(Registering the model when transformers imports its table of models does not work: that can happen in the middle
of other imports, when `PreTrainedModel` is not there yet.)
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType

_CONFIGURATIONS = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Make the Auto classes know guided folders, now or when they are imported; may be called again."""
    if _CONFIGURATIONS in sys.modules:
        _register_config()
    else:
        sys.meta_path.insert(0, _AfterConfigurations())


def _register_config() -> None:
    from transformers import AutoConfig

    from genarm.model.config import GuidedConfig

    AutoConfig.register("guided", GuidedConfig, exist_ok=True)


class _AfterConfigurations(importlib.abc.MetaPathFinder):
    """Finds that one module by the usual means and registers once it has been executed.

    It stays until then: a module may be looked up (`importlib.util.find_spec`) long before it is imported.
    """

    looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _CONFIGURATIONS or self.looking:
            return None
        self.looking = True  # so that the look-up below passes over this finder
        try:
            spec = find_spec(fullname)
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_then_register(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _register_config()

            spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec
