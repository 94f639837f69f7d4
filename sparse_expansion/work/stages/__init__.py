"""One function a stage. ``work.registry`` loads every module here; none is listed anywhere."""
