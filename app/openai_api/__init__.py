"""The models for programs: the part of OpenAI's interface that one computer can serve, over the page's own engine.

A router of its own, without the page, Gradio, conversations or the management of models. `door.py` lets in who has a
key, `bodies.py` says what may be asked, `orders.py` what that is for the engine, `asking.py` waits for a turn and asks,
`replies.py` says the answer as OpenAI would, `routes.py` puts them together.
"""
