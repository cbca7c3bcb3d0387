"""An ensemble as one model of vLLM: a plugin, which vLLM finds by its entry point `vllm.general_plugins`."""
