"""`python -m neft_core.bucket NAME`: make a bucket in an S3 store, unless it is there.

The store and its keys are those of boto3's own variables: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID ...
"""

import contextlib
import sys


def make(name: str) -> None:
    """Make a bucket of ours; one that is there already stays."""
    import boto3

    client = boto3.client("s3")
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=name)
    print(f"bucket {name} is there")


if __name__ == "__main__":
    make(sys.argv[1])
