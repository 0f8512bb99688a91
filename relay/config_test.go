package relay_test

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/relay"
)

func TestNewNamesEveryProblemAtOnce(t *testing.T) {
	small, err := pgxpool.New(testenv.Context(t), testenv.DatabaseURL(t)+"&pool_max_conns=2")
	if err != nil {
		t.Fatal(err)
	}
	defer small.Close()
	pub, err := relay.RabbitMQ(testenv.AMQPURL(t), relay.RabbitMQConfig{})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		db   *pgxpool.Pool
		pub  relay.Publisher
		cfg  relay.Config
		want []string
	}{
		{nil, nil, relay.Config{}, []string{"db is nil", "pub is nil"}},
		{small, pub, relay.Config{
			Schema: `a"b`, Lease: time.Second, RetryFor: -1, IdleInterval: -1, StopTimeout: -1, Name: strings.Repeat("n", 256),
		}, []string{"MaxConns is 2", `schema "a\"b"`, "Lease: 1s is shorter", "RetryFor: -1ns", "IdleInterval: -1ns", "StopTimeout: -1ns", "Name:"}},
		{small, pub, relay.Config{Lease: -1}, []string{"Lease: -1ns"}},
		{small, pub, relay.Config{Lease: 1, IdleInterval: 1}, []string{"Lease: 1ns", "IdleInterval: 1ns"}},
		{small, pub, relay.Config{Lease: 25 * time.Hour, IdleInterval: time.Hour}, []string{"Lease: 25h0m0s", "IdleInterval: 1h0m0s"}},
	} {
		_, err := relay.New(test.db, test.pub, test.cfg)
		if err == nil {
			t.Fatalf("accepted: %+v", test.cfg)
		}
		for _, want := range test.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q is not in: %s", want, err)
			}
		}
	}
	_, err = relay.RabbitMQ("amqp://u:S3cret@broker.example,x", relay.RabbitMQConfig{ConfirmTimeout: -1, WriteTimeout: -1})
	for _, want := range []string{"URL 1", "URL 2", "ConfirmTimeout", "WriteTimeout"} {
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "S3cret") {
			t.Errorf("%q is not in, or a password is: %v", want, err)
		}
	}
}

func TestSecondRunIsRefused(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r, _ := b.start()
	testenv.Eventually(t, 20*time.Second, "Ready", func() bool { return r.Ready() == nil })
	if err := r.Run(testenv.Context(t)); err == nil {
		t.Error("Run ran twice")
	}
}

// What doc.go says that the relay's role needs is enough, and it can publish,
// park, and hand over with it.
func TestRelayNeedsNoMoreThanItsGrants(t *testing.T) {
	t.Parallel()
	b := setup(t)
	owner := b.db
	b.db = owner.As(t, map[string]string{
		"outbox": "SELECT, DELETE", "outbox_lane": "SELECT, UPDATE", "txbox_version": "SELECT",
		"outbox_parked": "SELECT, INSERT, UPDATE, DELETE", "outbox_relay": "SELECT, INSERT, UPDATE, DELETE",
		"outbox_id_seq": "SELECT",
	})
	_, stop := b.start() // with a lease that lasts: the row of one that has run out stays for a while
	b.db = owner

	messages := b.messages(10, noKey)
	lost := messages[9]
	messages[9].Exchange, messages[9].RoutingKey = "", testenv.Name(t)
	b.write(messages...)
	b.eventuallyCount("outbox", 0)
	b.eventuallyCount("outbox_parked", 1)
	got := b.drain(b.queue, 9)
	b.checkAll(got, messages[:9], 0)
	_, err := b.ch.QueueDeclare(messages[9].RoutingKey, true, false, false, false, nil)
	b.must(err)
	b.eventuallyCount("outbox_parked", 0)
	if got := b.drain(messages[9].RoutingKey, 1); got[0].MessageId != lost.ID.String() {
		t.Errorf("delivered %s", got[0].MessageId)
	}
	_, err = b.ch.QueueDelete(messages[9].RoutingKey, false, false, false)
	b.must(err)
	stop()
	b.eventuallyCount("outbox_relay", 0)
}

func TestStatsAndReadyTell(t *testing.T) {
	t.Parallel()
	b := setup(t)
	pub, err := relay.RabbitMQ(b.amqpURL, relay.RabbitMQConfig{})
	b.must(err)
	idle, err := relay.New(b.db.Pool, pub, relay.Config{Schema: b.db.Schema, Logger: slog.New(slog.DiscardHandler)})
	b.must(err)
	if idle.Ready() == nil {
		t.Error("ready before Run")
	}
	r, stop := b.start(brisk)
	messages := b.messages(21, noKey)
	messages[20].Exchange, messages[20].RoutingKey = "", testenv.Name(t)
	b.write(messages...)
	want := relay.Stats{Published: 20, Refused: 1, Lanes: 64}
	testenv.Eventually(t, 20*time.Second, fmt.Sprintf("%+v", want), func() bool { return r.Stats() == want })
	b.must(r.Ready())
	stop()
}
