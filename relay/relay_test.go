package relay_test

import (
	"context"
	"flag"
	"fmt"
	"log"
	"log/slog"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/goleak"

	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
	"github.com/txbox/txbox/relay"
)

func TestMain(m *testing.M) {
	if os.Getenv("RELAY_TEST_CHILD") != "" {
		os.Exit(runChild())
	}
	if err := flag.Set("rapid.checks", "10000"); err != nil { // unless the command line says how many
		log.Fatal(err)
	}
	goleak.VerifyTestMain(m)
}

// runChild is a relay in a process of its own, for tests that kill it.
func runChild() int {
	ctx := context.Background()
	db, err := pgxpool.New(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		log.Print(err)
		return 1
	}
	pub, err := relay.RabbitMQ(os.Getenv("AMQP_URL"), relay.RabbitMQConfig{ConfirmTimeout: time.Second})
	if err != nil {
		log.Print(err)
		return 1
	}
	r, err := relay.New(db, pub, relay.Config{Schema: os.Getenv("RELAY_TEST_CHILD"), Lease: time.Second})
	if err != nil {
		log.Print(err)
		return 1
	}
	if err := r.Run(ctx); err != nil {
		log.Print(err)
		return 1
	}
	return 0
}

// startChild runs a relay as a process and returns it; it does not outlive the
// test.
func (b *bundle) startChild() *os.Process {
	b.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "RELAY_TEST_CHILD="+b.db.Schema, "DATABASE_URL="+b.db.URL, "AMQP_URL="+b.amqpURL)
	cmd.Stdout, cmd.Stderr = b.Output(), b.Output()
	b.must(cmd.Start())
	b.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait() // it was killed
	})
	return cmd.Process
}

// bundle is what a test of the relay has for itself.
type bundle struct {
	*testing.T
	db      *testenv.DB
	writer  outbox.Writer
	amqpURL string
	ch      *amqp.Channel
	queue   string // bound to the exchange of the same name
}

func setup(t *testing.T) *bundle {
	t.Helper()
	return setupAt(t, testenv.DatabaseURL(t), testenv.AMQPURL(t))
}

func setupAt(t *testing.T, databaseURL, amqpURL string) *bundle {
	t.Helper()
	b := &bundle{T: t, db: testenv.SchemaAt(t, databaseURL), amqpURL: amqpURL, queue: testenv.Name(t)}
	b.writer = outbox.Writer{Schema: b.db.Schema}
	b.connect()
	b.declare(b.queue)
	t.Cleanup(func() {
		b.ch.QueueDelete(b.queue, false, false, false)
		b.ch.ExchangeDelete(b.queue, false, false)
	})
	return b
}

// connect gives the test a channel of its own, also after a broker's restart.
func (b *bundle) connect() {
	b.Helper()
	conn, err := amqp.Dial(b.amqpURL)
	b.must(err)
	b.Cleanup(func() { conn.Close() })
	b.ch, err = conn.Channel()
	b.must(err)
}

func (b *bundle) must(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// declare makes a fanout exchange and a quorum queue of that name.
func (b *bundle) declare(name string) {
	b.Helper()
	b.must(b.ch.ExchangeDeclare(name, "fanout", true, false, false, false, nil))
	_, err := b.ch.QueueDeclare(name, true, false, false, false, amqp.Table{"x-queue-type": "quorum"})
	b.must(err)
	b.must(b.ch.QueueBind(name, "", name, false, nil))
}

// start runs a relay; the function that it returns stops it and checks that it
// stopped cleanly.
func (b *bundle) start(change ...func(*relay.Config, *relay.RabbitMQConfig)) (*relay.Relay, func()) {
	b.Helper()
	cfg := relay.Config{Schema: b.db.Schema, Logger: slog.New(slog.NewTextHandler(b.Output(), nil))}
	pubCfg := relay.RabbitMQConfig{}
	for _, c := range change {
		c(&cfg, &pubCfg)
	}
	pub, err := relay.RabbitMQ(b.amqpURL, pubCfg)
	b.must(err)
	r, err := relay.New(b.db.Pool, pub, cfg)
	b.must(err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	stopped := false
	stop := func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			b.Errorf("Run: %v", err)
		}
	}
	b.Cleanup(stop)
	return r, stop
}

func (b *bundle) write(msgs ...outbox.Message) {
	b.Helper()
	ctx := testenv.Context(b)
	b.must(pgx.BeginFunc(ctx, b.db, func(tx pgx.Tx) error { return b.writer.Write(ctx, tx, msgs...) }))
}

// messages makes n messages for the bundle's exchange.
func (b *bundle) messages(n int, key func(i int) string) []outbox.Message {
	msgs := make([]outbox.Message, n)
	for i := range msgs {
		msgs[i] = outbox.Message{ID: outbox.NewID(), Exchange: b.queue, Key: key(i), Type: fmt.Sprint(i), Payload: fmt.Appendf(nil, `{"n":%d}`, i)}
	}
	return msgs
}

func noKey(int) string { return "" }

// count returns how many rows a table holds.
func (b *bundle) count(table string) (n int) {
	b.Helper()
	b.must(b.db.QueryRow(testenv.Context(b), "SELECT count(*) FROM "+b.db.Table(table)).Scan(&n))
	return n
}

func (b *bundle) eventuallyCount(table string, want int) {
	b.Helper()
	testenv.Eventually(b, 30*time.Second, fmt.Sprintf("%d rows in %s", want, table), func() bool { return b.count(table) == want })
}

// drain takes messages from a queue until it has seen want different IDs and
// nothing more is there. It fails when no other came for half a minute.
func (b *bundle) drain(queue string, want int) []amqp.Delivery {
	b.Helper()
	deliveries, err := b.ch.Consume(queue, queue, true, false, false, false, nil)
	b.must(err)
	defer b.ch.Cancel(queue, false)
	var all []amqp.Delivery
	ids := make(map[string]bool)
	quiet := time.NewTimer(0)
	defer quiet.Stop()
	const patience = 30 * time.Second
	limit := time.NewTimer(patience)
	defer limit.Stop()
	for {
		select {
		case d := <-deliveries:
			all = append(all, d)
			if !ids[d.MessageId] {
				ids[d.MessageId] = true
				limit.Reset(patience)
			}
			quiet.Reset(200 * time.Millisecond)
		case <-quiet.C:
			if len(ids) >= want {
				return all
			}
			quiet.Reset(200 * time.Millisecond)
		case <-limit.C:
			b.Fatalf("%d of %d messages came to %s, and no other within %s", len(ids), want, queue, patience)
		}
	}
}

func TestCommittedMessagesArePublishedOnceAndDeleted(t *testing.T) {
	t.Parallel()
	b := setup(t)
	msgs := b.messages(2500, noKey)
	b.write(msgs...)
	r, stop := b.start()
	got := b.drain(b.queue, len(msgs))
	b.eventuallyCount("outbox", 0)
	stop()
	if len(got) != len(msgs) {
		t.Errorf("%d deliveries of %d messages", len(got), len(msgs))
	}
	if s := r.Stats(); s.Published != int64(len(msgs)) || s.Refused != 0 || s.Unknown != 0 || s.InHand != 0 {
		t.Errorf("stats %+v", s)
	}
}

func TestRolledBackMessagesAreNeverPublished(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.start()
	ctx := testenv.Context(t)
	tx, err := b.db.Begin(ctx)
	b.must(err)
	b.must(b.writer.Write(ctx, tx, b.messages(10, noKey)...))
	b.must(tx.Rollback(ctx))
	kept := b.messages(1, noKey)
	b.write(kept...)
	if got := b.drain(b.queue, 1); len(got) != 1 || got[0].MessageId != kept[0].ID.String() {
		t.Errorf("got %v", got)
	}
}

func TestMessageTravelsAsWritten(t *testing.T) {
	t.Parallel()
	b := setup(t)
	body := make([]byte, 256)
	for i := range body {
		body[i] = byte(i)
	}
	want := outbox.Message{
		ID: outbox.NewID(), Exchange: b.queue, RoutingKey: "a.b", Key: "order-1\n", Type: "order.placed", ContentType: "application/x",
		Headers: map[string]string{"traceparent": "00-1-2-01", "x-datadog-trace-id": "7", "empty": ""}, Payload: body,
	}
	before := time.Now().Add(-time.Minute)
	b.write(want)
	b.start()
	d := b.drain(b.queue, 1)[0]
	created, err := time.Parse(time.RFC3339Nano, d.Headers["outbox-created-at"].(string))
	b.must(err)
	if created.Before(before) || d.Timestamp.Sub(created).Abs() > time.Second {
		t.Errorf("created at %s, timestamp %s", created, d.Timestamp)
	}
	delete(d.Headers, "outbox-created-at")
	delete(d.Headers, "x-delivery-count") // the queue's
	got := fmt.Sprintln(d.MessageId, d.Exchange, d.RoutingKey, d.Type, d.ContentType, d.Headers, d.Body, d.DeliveryMode, d.UserId, d.AppId)
	if want := fmt.Sprintln(want.ID, want.Exchange, want.RoutingKey, want.Type, want.ContentType,
		"map[empty: outbox-key:order-1\n traceparent:00-1-2-01 x-datadog-trace-id:7]", body, amqp.Persistent, "", ""); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}
