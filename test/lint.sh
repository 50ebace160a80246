#!/bin/sh
# Formatting, vet for Linux and Windows, staticcheck, and govulncheck where it
# is installed (it needs its database from the network).
set -eu
GO=${GO:-go}
unformatted=$(gofmt -l $(git ls-files --cached --others --exclude-standard '*.go'))
if [ -n "$unformatted" ]; then
	echo "not formatted by gofmt:" $unformatted
	exit 1
fi
$GO vet ./...
GOOS=windows $GO build ./...
GOOS=windows $GO vet ./...
$GO tool staticcheck ./...
if command -v govulncheck >/dev/null; then
	govulncheck ./...
else
	echo "govulncheck is not installed: not run"
fi
