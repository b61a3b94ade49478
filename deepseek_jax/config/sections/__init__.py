"""The sections of `Config`, frozen dataclasses whose fields are written with `option`. To add a section,
write a dataclass here and a line in options.Config; rules between options go to ../rules/.
"""
