"""One policy a module. ``--copus-policy norm-test:eta=0.2`` calls ``norm_test.make(settings, base, options)``.

A new module here is a new policy; nothing else has to be changed for it.
"""
