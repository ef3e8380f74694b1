"""The command line: one file per command, with its arguments, what it calls and what it prints.

Commands of studies are next to their programs (``vmoe/studies/NAME/command.py``).

Each command has ``run(argv)``, which raises errors of ``vmoe.errors``; ``main`` runs it and turns
errors into exit statuses, ``arguments`` parses, ``printing`` prints tables and JSON. Only
commands use option names; errors of the library name fields.
"""
