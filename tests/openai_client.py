#!/usr/bin/env python3
"""OpenAI's own client against a server of tests/fixtures/ferris-7m: openai_client.py URL KEY."""

import sys

import openai

url, key = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)

(model,) = client.models.list()
assert client.models.retrieve(model.id).id == model.id

# Both forms, whole and streamed.
whole = client.completions.create(model=model.id, prompt="Ownership is", max_tokens=12)
assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 12, whole
pieces = client.completions.create(model=model.id, prompt="Ownership is", max_tokens=12, stream=True)
assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text

messages = [{"role": "user", "content": [{"type": "text", "text": "What is a trait?"}]}]
chat = client.chat.completions.create(model=model.id, messages=messages, max_tokens=12, n=2, seed=1, temperature=0.8)
assert [choice.index for choice in chat.choices] == [0, 1], chat
assert chat.choices[0].message.role == "assistant" and chat.choices[0].message.content, chat
stream = client.chat.completions.create(
    model=model.id,
    messages=messages,
    max_completion_tokens=12,
    n=2,
    seed=1,
    temperature=0.8,
    stream=True,
    stream_options={"include_usage": True},
)
texts, usage = {0: "", 1: ""}, None
for chunk in stream:
    usage = chunk.usage or usage
    for choice in chunk.choices:
        texts[choice.index] += choice.delta.content or ""
assert texts == {choice.index: choice.message.content for choice in chat.choices}, (texts, chat)
assert usage == chat.usage, (usage, chat.usage)

# Errors are the client's own types.
for wrong, body, param in [
    (openai.BadRequestError, {"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    (openai.BadRequestError, {"messages": messages, "frequency_penalty": 1}, "frequency_penalty"),
]:
    try:
        client.chat.completions.create(model=model.id, **body)
    except wrong as error:
        assert error.param == param, error
    else:
        raise AssertionError(f"{body} is taken")
try:
    openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
except openai.AuthenticationError as error:
    assert error.code == "invalid_api_key", error
else:
    raise AssertionError("the wrong key is taken")
