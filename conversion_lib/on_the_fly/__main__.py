"""The subprocess that converts on the fly: `python -m conversion_lib.on_the_fly JOB`, where JOB is a JSON object."""

from conversion_lib.on_the_fly.child import main

main()
