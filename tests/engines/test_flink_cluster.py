"""The Flink cluster of the fixtures: parts of it can be killed and come back."""

from tests.engines.server import members


def test_a_task_manager_and_the_job_manager_may_be_killed_and_come_back(flink_cluster):
    killed = flink_cluster.task_managers[1].pid
    flink_cluster.kill_task_manager(1)
    assert members(killed) == []
    flink_cluster.wait_for_task_managers(1)
    flink_cluster.start_task_manager(1)
    flink_cluster.wait_for_task_managers(2)
    flink_cluster.kill_job_manager()
    flink_cluster.restart_job_manager()
    flink_cluster.wait_for_task_managers(2)
    assert flink_cluster.jobs() == {}
