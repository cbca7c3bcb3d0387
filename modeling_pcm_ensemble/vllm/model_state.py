"""How vLLM's V2 runner, the default on GPUs, tells the model of its requests."""

from typing import Any

from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from .requests import RequestTable


class EnsembleModelState(DefaultModelState):
    """Follows requests by the runner's own numbers, which stay what they are while a request runs."""

    def __init__(self, vllm_config, model, encoder_cache, device):
        super().__init__(vllm_config, model, encoder_cache, device)
        self.table = RequestTable.of(vllm_config, device)

    def add_request(self, req_index: int, new_req_data):
        super().add_request(req_index, new_req_data)
        self.table.set(req_index, new_req_data.sampling_params, new_req_data.prompt_token_ids)

    def prepare_inputs(self, input_batch, req_states) -> dict[str, Any]:
        places = input_batch.idx_mapping_np[: input_batch.num_reqs].tolist()
        return super().prepare_inputs(input_batch, req_states) | {"batch": self.table.batch(places)}
