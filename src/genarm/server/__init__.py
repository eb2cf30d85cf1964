"""An HTTP server in front of a model, as OpenAI's clients expect one; reward weights are part of every request.

A request comes in through `security`, is checked by `schema`, gets its weights from `names` and its token ids from
`texts`, is let in by `admission`, runs as a `Job` on a `backend`, and goes out through `chat` or `completions`, whole
or as a stream. `errors` says what was wrong, `metrics` counts, `app` puts it together, `listen` serves it.
"""
