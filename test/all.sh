#!/bin/sh
# make test: everything there is to test, one step after the other; all steps
# run, and the last lines say which failed. $SUDO is "sudo" for everybody but
# root: the tests on real guests run under it, built beforehand.
set -u
GO=${GO:-go}
SUDO=${SUDO:-}
top=$(pwd)
report= failed= began=$(date +%s)

step() { # step NAME COMMAND...
	name=$1 from=$(date +%s)
	shift
	echo "== $name"
	if "$@"; then word=ok; else
		word=FAILED
		failed="$failed, $name"
	fi
	line="$word: $name, $(($(date +%s) - from)) s"
	report="$report$line
"
	echo "== $line"
}

# Packages with tests that ask for guests are those that use the lab. They run
# side by side, and so do their tests, as many as the lab has places (lab.Beside).
lab_tests() {
	ok=0 outs= pids=
	mkdir -p bin/lab/tests
	for dir in $(grep -rlE --include='*_test.go' 'lab\.(Need|Beside)\(' internal test | xargs -r dirname | sort -u); do
		out=$top/bin/lab/tests/$(echo "$dir" | tr / -)
		CGO_ENABLED=0 $GO test -c -o "$out.test" "./$dir" || { ok=1; continue; }
		echo "-- $dir"
		(cd "$dir" && exec $SUDO env HOLDFAST_LAB=1 HOLDFAST_BIN="$top/bin/holdfast" \
			HOLDFAST_VERSITYGW="${HOLDFAST_VERSITYGW:-}" \
			"$out.test" -test.v -test.parallel 16 -test.timeout 25m -test.run "${RUN:-.}" >"$out.log" 2>&1) &
		outs="$outs $out" pids="$pids $!"
	done
	# What runs in the background does not get the terminal's Ctrl-C.
	trap 'kill $pids; exit 1' INT TERM
	for p in $pids; do wait "$p" || ok=1; done
	trap - INT TERM
	for out in $outs; do
		echo "-- $(basename "$out")"
		cat "$out.log"
	done
	return $ok
}

if [ -x bin/lab/versitygw ]; then
	export HOLDFAST_VERSITYGW="$top/bin/lab/versitygw"
else
	echo "SKIPPED: the tests on a real S3 server: bin/lab/versitygw could not be built"
fi

step build make --no-print-directory build
step lint sh test/lint.sh
# Lint has vetted what is tested.
step "unit and conformance tests" $GO test -vet=off -timeout 15m ./...
# The detector makes tests five times as long: the exhaustive ones, of every cut
# at every call, are left out, and those that run the program as a whole.
step "race tests" $GO test -vet=off -race -short -timeout 15m $($GO list ./... | grep -v /cmd/)
step "real guests" lab_tests

echo
printf '%s' "$report"
total=$(($(date +%s) - began))
if [ -n "$failed" ]; then
	echo "FAILED after $total s:${failed#,}"
	exit 1
fi
echo "All passed in $total s."
