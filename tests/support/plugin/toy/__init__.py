"""A package that adds a method, a kind of result, an allocator, a stage and a form."""
