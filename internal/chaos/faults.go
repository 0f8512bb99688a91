package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/internal/faultproxy"
)

// fault is one way to do harm.
type fault struct {
	name   string
	target string // a process, server or proxy; faults of one target are never done together
	// do harms, and returns how that is ended.
	do func(ctx context.Context, r *run, rng *rand.Rand) (heal func() error, err error)
}

func nothing() error { return nil }

// catalogue returns all faults that a run can have.
func catalogue() (all []fault) {
	for _, name := range []string{"relay-1", "relay-2", "consumer-1", "consumer-2", "consumer-3", "producer-1", "producer-2"} {
		all = append(all, processFaults(name)...)
	}
	for _, name := range []string{producerDB, relayDB, consumerDB, relayBroker, consumerBroker} {
		all = append(all, networkFaults(name)...)
	}
	for _, name := range []string{producerDB, relayDB, consumerDB} {
		all = append(all, commitFaults(name)...)
	}
	all = append(all, confirmFaults()...)
	all = append(all, postgresFaults()...)
	return append(all, brokerFaults()...)
}

// failpoints of each role; see package failpoint.
var failpoints = map[string][]string{
	"relay": {"relay/publish", "relay/published", "relay/confirmed", "relay/mid-delete", "relay/deleted", "relay/unpark",
		"relay/park", "relay/parked", "relay/lease", "relay/leased"},
	"consumer": {"inbox/received", "inbox/recorded", "inbox/handled", "inbox/committed", "inbox/park", "inbox/parked", "inbox/claimed", "inbox/unparked", "consumer/handler"},
	"producer": {"producer/commit", "producer/committed"},
}

func processFaults(name string) []fault {
	role, _, _ := strings.Cut(name, "-")
	start := func(c *child) func() error { return func() error { return c.start() } }
	return []fault{
		{role + "-kill", name, func(_ context.Context, r *run, _ *rand.Rand) (func() error, error) {
			c := r.child(name)
			c.kill()
			return start(c), nil
		}},
		{role + "-stop", name, func(_ context.Context, r *run, _ *rand.Rand) (func() error, error) {
			c := r.child(name)
			return func() error { return c.signal(syscall.SIGCONT) }, c.signal(syscall.SIGSTOP)
		}},
		{role + "-restart", name, func(_ context.Context, r *run, _ *rand.Rand) (func() error, error) {
			c := r.child(name)
			_ = c.signal(syscall.SIGTERM) // a server that is away meanwhile may keep it from stopping in time
			if !c.awaitExit(stopLimit) {
				c.kill()
			}
			return start(c), nil
		}},
		{role + "-failpoint", name, func(_ context.Context, r *run, rng *rand.Rand) (func() error, error) {
			c := r.child(name)
			c.kill()
			points := failpoints[role]
			deed := []string{"kill", "panic"}[rng.IntN(2)]
			order := fmt.Sprintf("TXBOX_FAILPOINT=%s=%s@%d", points[rng.IntN(len(points))], deed, 1+rng.IntN(20))
			heal := func() error {
				c.kill() // it may not have come there
				return c.start()
			}
			return heal, c.start(order)
		}},
	}
}

func networkFaults(name string) []fault {
	through := func(do func(p *faultproxy.Proxy, rng *rand.Rand)) func(context.Context, *run, *rand.Rand) (func() error, error) {
		return func(_ context.Context, r *run, rng *rand.Rand) (func() error, error) {
			do(r.site.proxies[name], rng)
			return r.site.proxies[name].Heal, nil
		}
	}
	return []fault{
		{"net-cut", name, through(func(p *faultproxy.Proxy, _ *rand.Rand) { p.Cut() })},
		{"net-cut-after", name, through(func(p *faultproxy.Proxy, rng *rand.Rand) { p.CutAfter(1 + rng.Int64N(100_000)) })},
		{"net-refuse", name, through(func(p *faultproxy.Proxy, _ *rand.Rand) { p.Refuse() })},
		{"net-vanish", name, through(func(p *faultproxy.Proxy, _ *rand.Rand) { p.Vanish() })},
		{"net-stall", name, through(func(p *faultproxy.Proxy, _ *rand.Rand) { p.Stall() })},
		{"net-slow", name, through(func(p *faultproxy.Proxy, rng *rand.Rand) { p.Slow(10_000 + rng.IntN(100_000)) })},
	}
}

// commitFaults lose COMMITs and answers to them, now and then.
func commitFaults(name string) []fault {
	intercept := func(hit func(faultproxy.Frame) bool) func(context.Context, *run, *rand.Rand) (func() error, error) {
		return func(_ context.Context, r *run, rng *rand.Rand) (func() error, error) {
			p := r.site.proxies[name]
			every := 1 + rng.IntN(50)
			p.Intercept(func(f faultproxy.Frame) faultproxy.Action {
				if hit(f) && rand.IntN(every) == 0 { // by many at once: rng is for one
					return faultproxy.CutBefore
				}
				return faultproxy.Forward
			})
			return p.Heal, nil
		}
	}
	return []fault{
		{"commit-lost", name, intercept(faultproxy.Frame.IsCommit)},
		{"commit-answer-lost", name, intercept(faultproxy.Frame.IsCommitted)},
	}
}

// confirmFaults are those of the relay's frames.
func confirmFaults() []fault {
	intercept := func(method uint32, action faultproxy.Action) func(context.Context, *run, *rand.Rand) (func() error, error) {
		return func(_ context.Context, r *run, rng *rand.Rand) (func() error, error) {
			p := r.site.proxies[relayBroker]
			every := 5 + rng.IntN(50)
			p.Intercept(func(f faultproxy.Frame) faultproxy.Action {
				if f.Method() == method && rand.IntN(every) == 0 {
					return action
				}
				return faultproxy.Forward
			})
			return p.Heal, nil
		}
	}
	return []fault{
		{"confirm-lost", relayBroker, intercept(faultproxy.BasicAck, faultproxy.Drop)},
		{"confirm-late", relayBroker, intercept(faultproxy.BasicAck, faultproxy.Delay(300*time.Millisecond))},
		{"cut-at-confirm", relayBroker, intercept(faultproxy.BasicAck, faultproxy.CutBefore)},
		{"cut-in-publish", relayBroker, intercept(faultproxy.BasicPublish, faultproxy.CutAfter)},
	}
}

const (
	postgresTarget = "postgres"
	brokerTarget   = "broker"
)

func postgresFaults() []fault {
	terminate := func(where string) func(context.Context, *run, *rand.Rand) (func() error, error) {
		return func(ctx context.Context, r *run, _ *rand.Rand) (func() error, error) {
			_, err := r.site.shop.Exec(ctx, "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity WHERE usename = 'chaos' AND pid <> pg_backend_pid() "+where+") s")
			return nothing, err
		}
	}
	return []fault{
		{"postgres-backend", postgresTarget, terminate("ORDER BY random() LIMIT 1")},
		{"postgres-backends", postgresTarget, terminate("")},
		{"postgres-restart", postgresTarget, func(ctx context.Context, r *run, _ *rand.Rand) (func() error, error) {
			return func() error { return r.site.postgres.Start(ctx) }, r.site.postgres.Stop(ctx)
		}},
		{postgresKill, postgresTarget, func(ctx context.Context, r *run, _ *rand.Rand) (func() error, error) {
			return func() error { return r.site.postgres.Start(ctx) }, r.site.postgres.Kill()
		}},
		{"postgres-stop", postgresTarget, func(_ context.Context, r *run, _ *rand.Rand) (func() error, error) {
			return r.site.postgres.Resume, r.site.postgres.Pause()
		}},
	}
}

// postgresKill may take back commits that did not wait for the disk.
const postgresKill = "postgres-kill"

func brokerFaults() []fault {
	control := func(args ...string) func(context.Context, *run) error {
		return func(ctx context.Context, r *run) error { _, err := r.site.broker.Ctl(ctx, args...); return err }
	}
	alarm := func(on, off func(context.Context, *run) error) func(context.Context, *run, *rand.Rand) (func() error, error) {
		return func(ctx context.Context, r *run, _ *rand.Rand) (func() error, error) {
			return func() error { return off(ctx, r) }, on(ctx, r)
		}
	}
	return []fault{
		{"broker-close", brokerTarget, alarm(control("close_all_connections", "chaos"), func(context.Context, *run) error { return nil })},
		{"broker-memory", brokerTarget, alarm(control("set_vm_memory_high_watermark", "0.00001"), control("set_vm_memory_high_watermark", "0.6"))},
		{"broker-disk", brokerTarget, alarm(control("set_disk_free_limit", "100TB"), control("set_disk_free_limit", "50MB"))},
		{"broker-restart", brokerTarget, func(ctx context.Context, r *run, _ *rand.Rand) (func() error, error) {
			return func() error { return r.site.broker.Start(ctx) }, r.site.broker.Stop(ctx)
		}},
		{"broker-kill", brokerTarget, func(ctx context.Context, r *run, _ *rand.Rand) (func() error, error) {
			return func() error { return r.site.broker.Start(ctx) }, r.site.broker.Kill()
		}},
		{"broker-stop", brokerTarget, func(_ context.Context, r *run, _ *rand.Rand) (func() error, error) {
			return r.site.broker.Resume, r.site.broker.Pause()
		}},
		{"binding-removed", brokerTarget, onChannel(func(ch *amqp.Channel) error { return ch.ExchangeUnbind(fan, routingKey, exchange, false, nil) })},
		{"exchange-removed", brokerTarget, onChannel(func(ch *amqp.Channel) error { return ch.ExchangeDelete(exchange, false, false) })},
	}
}

// onChannel has the topology declared again afterwards.
func onChannel(do func(*amqp.Channel) error) func(context.Context, *run, *rand.Rand) (func() error, error) {
	return func(_ context.Context, r *run, _ *rand.Rand) (func() error, error) {
		return func() error { return r.site.withChannel(topology) }, r.site.withChannel(do)
	}
}
