"""Requests to tiny models of every family, and what `LanguageModel.generate` answers to each alone."""

from qformer.config import GenerationSettings
from qformer.generation.requests.inputs import prompt_inputs
from qformer.generation.requests.request import EngineRequest, RequestSettings
from tests.qformer.test_language import PROMPTS, soft_prompts

LENGTHS = (12, 3, 20, 1, 7)


def make_requests(language, lengths=LENGTHS, **settings):
    """One request a prompt, each of its own length."""
    return [
        EngineRequest(
            inputs_SL=prompt_inputs(language, prefix_NL, prompt),
            settings=RequestSettings(max_new_tokens=length, **settings),
        )
        for prefix_NL, prompt, length in zip(soft_prompts(language), PROMPTS, lengths, strict=True)
    ]


def reference_answers(language, lengths=LENGTHS, **settings):
    """The offline path, one by one."""
    prefix_BNL = soft_prompts(language)
    return [
        language.generate(prefix_BNL[i : i + 1], [prompt], GenerationSettings(max_new_tokens=length, **settings))[0]
        for i, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True))
    ]
