"""A stand-in for clearml: what deepseek_jax calls of it, with its signatures."""

import stand_in


class Logger:
    def report_scalar(self, title, series, value, iteration):
        given = {"title": title, "series": series, "value": value, "iteration": iteration}
        stand_in.call("clearml.report_scalar", **given)


class Task:
    def __init__(self, id):
        self.id = id

    @classmethod
    def init(
        cls,
        project_name=None,
        task_name=None,
        reuse_last_task_id=True,
        continue_last_task=False,
        auto_connect_arg_parser=True,
        auto_connect_frameworks=True,
        auto_connect_streams=True,
    ):
        given = {"project_name": project_name, "task_name": task_name}
        given |= {"reuse": reuse_last_task_id, "continue": continue_last_task}
        stand_in.call("clearml.init", **given)
        return cls(reuse_last_task_id or "task")

    @classmethod
    def is_offline(cls):
        return False

    def update_parameters(self, *args, **kwargs):
        stand_in.call("clearml.update_parameters", parameters=args[0])

    def get_logger(self):
        return Logger()

    def get_output_log_web_page(self):
        return "https://clearml.example/task"

    def get_offline_mode_folder(self):
        return None

    def mark_failed(self, status_message=None):
        stand_in.call("clearml.mark_failed")

    def close(self):
        stand_in.call("clearml.close")
