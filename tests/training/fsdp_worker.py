"""`examples/train.py` under FSDP2 on CPUs, which accelerate shards only where it believes to see several GPUs."""

import json
import runpy

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from etchat_hf.training import ETChatTrainer


class ShardedTrainer(ETChatTrainer):
    def create_accelerator_and_postprocess(self):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()

    def _prepare_for_training(self, *args, **kwargs):
        result = super()._prepare_for_training(*args, **kwargs)
        parameters = list(self.model.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        counts = {
            "local": sum(parameter.to_local().numel() for parameter in parameters),
            "full": sum(parameter.numel() for parameter in parameters),
        }
        print(f"sharded: {json.dumps(counts)}", flush=True)
        return result


if __name__ == "__main__":
    import etchat_hf.training

    etchat_hf.training.ETChatTrainer = ShardedTrainer
    runpy.run_path("examples/train.py", run_name="__main__")
