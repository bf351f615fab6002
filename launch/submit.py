"""Run launch/pretrain.py on a cluster: as a Slurm batch job, a Kubernetes Indexed Job, or a torchrun line a machine.

    python launch/submit.py --dry-run job=slurm job.nodes=2 model=1b optimizer=galore run.dir=/shared/runs/try
    python launch/submit.py job=k8s job.nodes=2 job.image=IMAGE job.claim=CLAIM run.dir=/runs/try
    python launch/submit.py job=torchrun job.nodes=2 job.hosts='[alpha, beta]' run.dir=/shared/runs/try

``--dry-run`` prints the job; without it sbatch or kubectl gets it. ``job.…`` keys are the job's, all others those of
launch/pretrain.py, and checked here, before the queue. ``--help`` lists them. Exit codes: 0, or 2 for what the user can
change.
"""

from thinrank.configs.command import end_with, refuse, say


def main(argv: list[str]) -> int:
    from thinrank.configs.arguments import parse
    from thinrank.configs.errors import ConfigError
    from thinrank.trainers.errors import UserError

    try:
        arguments = parse(argv)
        from thinrank.configs.schema import SUBMIT

        if arguments.action == "help":
            from thinrank.configs.help import help_text

            return say(help_text(SUBMIT, arguments, usage="launch/submit.py"))
        from thinrank.configs.load import load
        from thinrank.configs.submission import command_line, training_words
        from thinrank.trainers.cluster.submit import render, submit

        loaded = load(SUBMIT, arguments)
        if arguments.action == "cfg":
            from thinrank.configs.reader import write

            return say(write(loaded.tree).rstrip())
        loaded.config.check()
        text = render(
            loaded.config, training_words(loaded, arguments), made_by=command_line(arguments, "launch/submit.py")
        )
        return say((text if arguments.action == "dry-run" else submit(loaded.config, text)).rstrip())
    except (ConfigError, UserError) as error:
        return refuse(error)


if __name__ == "__main__":
    end_with(main)
