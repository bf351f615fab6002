"""Jobs on clusters: from one configuration to a Slurm script, a Kubernetes manifest or torchrun lines, and the verdict
on a job that has ended."""
