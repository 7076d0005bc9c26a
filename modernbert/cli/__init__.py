"""The command line. `main` lists the commands; a file per family of commands holds them; `common` what they share."""
