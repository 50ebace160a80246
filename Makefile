# make demo    a lost VM runs again from its backup: the story, on a real guest
# make test    everything: unit and conformance tests, race tests, then real guests
# make build   bin/holdfast
# make race    the fast part of the tests, under the race detector
# make lint    gofmt, vet (Linux and Windows), staticcheck
# make bench   speed beside others', into bench/results.md      QUICK=1, CLEAN=1, ONLY=part
# make soak    hours of random histories and kills             SOAK_ROUNDS=200, SOAK_HOURS=8, SEED=n
#
# demo, test, bench and soak install Debian packages that are missing and start
# libvirt when it is not running. That, and what uses guests, runs as root:
# through sudo for everybody else.

GO      ?= go
SUDO    := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LAB     := bin/lab
# The S3 server of the tests.
VERSITYGW := github.com/versity/versitygw/cmd/versitygw@v1.8.0

.PHONY: demo test build race bench soak lint lab
.DEFAULT_GOAL := build

build:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-X main.version=$(VERSION)" -o bin/holdfast ./cmd/holdfast

# The lab: see the comment of package test/lab.
lab:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags -s -o $(LAB)/ ./test/lab/labctl ./test/lab/guestwriter
	$(SUDO) $(LAB)/labctl setup -writer $(LAB)/guestwriter

demo: build lab
	CGO_ENABLED=0 $(GO) build -trimpath -o $(LAB)/ ./test/demo
	@$(SUDO) $(LAB)/demo -holdfast bin/holdfast

# Without it (no network) the tests that want it are skipped, and say so.
$(LAB)/versitygw:
	-GOBIN=$(CURDIR)/$(LAB) CGO_ENABLED=0 $(GO) install -trimpath -ldflags -s $(VERSITYGW)

test: lab $(LAB)/versitygw
	@GO="$(GO)" SUDO="$(SUDO)" sh test/all.sh

race:
	$(GO) test -race -short -timeout 15m $$($(GO) list ./... | grep -v /cmd/)

lint:
	@GO="$(GO)" sh test/lint.sh

bench: build lab $(LAB)/versitygw
	CGO_ENABLED=0 $(GO) build -trimpath -o $(LAB)/ ./bench
	CGO_ENABLED=0 $(GO) test -c -o $(LAB)/repo.test ./internal/repo
	$(SUDO) $(LAB)/bench -holdfast bin/holdfast -repotest $(LAB)/repo.test $(if $(QUICK),-quick) $(if $(CLEAN),-clean) $(if $(ONLY),-only $(ONLY))

# First the repository's own: random histories of many writers, and the program
# killed some five times a round. Then the guests, for hours.
soak: build lab
	HOLDFAST_SOAK=$(or $(SOAK_ROUNDS),200) $(GO) test -timeout 0 -v \
		-run '^(TestManyWriters|TestKilledAtAnyMoment|TestPruneHistory|TestPruneOneFault|TestBitRot)$$' \
		./internal/repo ./internal/replica ./cmd/holdfast
	CGO_ENABLED=0 $(GO) test -c -o $(LAB)/ ./test/e2e
	cd test/e2e && $(SUDO) env HOLDFAST_LAB=1 HOLDFAST_BIN=$(CURDIR)/bin/holdfast SOAK_HOURS=$(or $(SOAK_HOURS),8) SEED=$(SEED) \
		$(CURDIR)/$(LAB)/e2e.test -test.v -test.run '^TestSoak$$' -test.timeout 0
