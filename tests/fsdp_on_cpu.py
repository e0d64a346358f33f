"""`gmsa train` under FSDP2 on CPU processes, started by torchrun.

accelerate switches FSDP on only where it finds an accelerator; torch itself shards on CPU as well. This switches it on,
and nothing else is different from `accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m gmsa train ...`.
"""

import os
import sys
from typing import Any

os.environ.update(
    {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
)

import torch.distributed
from accelerate.state import AcceleratorState, DistributedType
from torch.distributed.fsdp import FSDPModule

from gmsa.cli.main import main
from gmsa.train.trainer import GmsaTrainer

initialise = AcceleratorState.__init__


def switch_fsdp_on(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)


AcceleratorState.__init__ = switch_fsdp_on

step = GmsaTrainer.compute_loss


def check_sharded(self: GmsaTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
    assert isinstance(model, FSDPModule)
    sharded = [p for p in model.parameters() if hasattr(p, "placements")]
    assert len(sharded) == len(list(model.parameters()))
    return step(self, model, *args, **kwargs)


GmsaTrainer.compute_loss = check_sharded

code = main(sys.argv[1:])
assert not torch.distributed.is_initialized()  # else the process may abort as it ends
sys.exit(code)
