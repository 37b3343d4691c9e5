"""LoRA files of other programs, and PEFT folders, into each other where that is exact.

convert.py     what is public: which format a path is, and the way from one to another
lora.py        what all formats share: the factors of one module, and files of tensors
peft.py, kohya.py, diffusers.py, mlx.py, torchtune.py   one format each: read and write
flat.py        kohya's names, in which the dots are underscores
known.py       names of modules of a model that is at hand
"""
