"""Processors of images and text."""

COMPANIONS = {
    "preprocessor_config.json": '{"do_resize": true}',
    "processor_config.json": '{"patch_size": 7}',
    "video_preprocessor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "chat_template.json": "{}",
}
"""Files beside a tokenizer that a processor is made of, by name; not read on text alone."""
