"""The playground: one's own settings beside plain Heun and a fine reference, in a page.

`choice` is what the page's controls say, `session` computes the answer, `copying` and `showing`
turn it into text and pictures. Only `page` knows gradio.
"""
