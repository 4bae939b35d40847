"""Files and folders that commands are given: checked before anything heavy is imported."""

from pathlib import Path

PATH_STARTS = ("/", "./", "../", "~/")


def refuse_missing(option: str, name: str) -> None:
    """Raise if `name` is a folder that is not there, or has nothing in it.

    Raises:
        ValueError: It is.
    """
    path = Path(name).expanduser()
    if not name:
        raise ValueError(f"{option} is empty: give a folder, or a repository on the Hub.")
    if path.is_dir():
        if not any(path.iterdir()):
            raise ValueError(
                f"{option} {name}: the folder is empty, there is no config.json. Give one with a model in it."
            )
    elif path.exists():
        raise ValueError(f"{option} {name}: a file. Give the folder with config.json and the weights.")
    elif name.startswith(PATH_STARTS) or name.count("/") > 1:
        raise ValueError(f"{option} {name}: there is no such folder.")


def refuse_used_folder(path: Path, option: str = "") -> None:
    """Raise unless `path` is an empty folder, or not there.

    Raises:
        FileExistsError: It is something else.
    """
    given = f" {option}".rstrip()
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"{path} is not empty: give{given} a folder that is, or is not there.")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file: give{given} an empty folder, or one that is not there.")


def refuse_sources(option: str, file: Path | None, dataset: str | None) -> None:
    """Raise unless rows are given by a file that is there, by `option`, or by a dataset.

    Raises:
        ValueError: They are given in both ways or in none, or there is no such file.
    """
    if (file is None) == (dataset is None):
        both = (
            "both say where rows are: give one of them" if file is not None else "are not given: one of them is needed"
        )
        raise ValueError(f"{option} and --dataset-name {both}.")
    if file is None:
        if not dataset:
            raise ValueError("--dataset-name is empty: give a dataset on the Hub, or a folder.")
        return
    if file.is_dir() or not (file.exists() or file.suffix):
        what = "a folder" if file.is_dir() else "there is no such file"
        raise ValueError(
            f"{option} {file}: {what}. A dataset, on the Hub or in a folder, is given by --dataset-name {file}."
        )
    refuse_file(option, file)


def refuse_file(option: str, path: Path) -> None:
    """Raise unless `path` is a file.

    Raises:
        ValueError: It is not there, or is a folder.
    """
    if not path.is_file():
        raise ValueError(f"{option} {path}: {'a folder, not a file' if path.is_dir() else 'there is no such file'}.")
