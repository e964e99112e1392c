"""Answers of S3 that a test plans: a `before-send` hook of boto3 that returns one keeps the request from leaving."""

import io

from botocore.awsrequest import AWSResponse


class _Raw(io.BytesIO):
    def stream(self, **_):
        yield self.read()


def s3_answer(request, status, text="", **headers):
    """Return an answer of S3."""
    return AWSResponse(request.url, status, headers, _Raw(text.encode()))


def s3_error(request, status, code):
    """Return S3's answer that a request failed; to a HEAD, S3 answers without a text."""
    text = f"<Error><Code>{code}</Code><Message>planned</Message></Error>"
    return s3_answer(request, status, "" if request.method == "HEAD" else text)
