"""The generation engine: continuous batching over a frozen language model that reads soft prompts.

    engine = Engine(language, kv_tokens=16384, max_requests=32)        # `engine`: the steps, for one caller
    answers = complete(engine, [EngineRequest(inputs_SL=...), ...])    # `completion`: whole answers, offline
    serving = AsyncEngine(engine)                                      # `async_engine`: a thread, for event loops
    async for delta in serving.generate(request): ...

`requests/inputs` makes a request's rows of soft prompts and text, `requests/request` has its settings, deltas and
errors. Requests of any bridges mix in one batch, because the engine gets rows of the language model's width alone.
`passes/` has the forward passes; another family of language models is a class there.
"""
