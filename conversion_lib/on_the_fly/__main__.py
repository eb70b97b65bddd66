"""The subprocess that converts on the fly: `python -m conversion_lib.on_the_fly JOB`, JOB being one JSON object."""

from conversion_lib.on_the_fly.child import main

main()
