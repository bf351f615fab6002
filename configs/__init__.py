"""Configuration: dataclasses, YAML files and ``key=value`` become one checked tree.

The loader is generic (`load`, `Schema`); `thinrank.configs.schema.PRETRAIN` is what `launch/pretrain.py` configures.
"""

if __name__ != "thinrank.configs":
    raise ImportError(
        "write `import thinrank.configs`, not `import configs`: a second copy of every class would be made"
    )

from thinrank.configs.compose import Schema
from thinrank.configs.errors import ConfigError
from thinrank.configs.load import Loaded, load

__all__ = ["ConfigError", "Loaded", "Schema", "load"]
